"""patch(): whoever holds one of torch's functions follows, and nothing else changes."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pickle
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import reference as ref
import torch
from torch.nn.utils import clip_grad

import gradclip_ext
from gradclip_ext import patch, unpatch
from gradclip_ext.patch import FUNCTIONS, original_functions

IMPORTED_BEFORE = {name: getattr(torch.nn.utils, name) for name in FUNCTIONS}
ORIGINALS = {name: function.__wrapped__ for name, function in IMPORTED_BEFORE.items()}
OVERFLOWING = (3e20, 4e20)


def make_parameter(values=OVERFLOWING):
    parameter = torch.nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def is_ours(clip_grad_norm_=IMPORTED_BEFORE["clip_grad_norm_"]):
    """Whether a function measures what overflows float32 in torch's."""
    parameter = make_parameter()
    norm = clip_grad_norm_([parameter], 1.0).item()
    assert norm in (math.inf, pytest.approx(5e20))
    # torch zeroes what it could not measure.
    expected = [0.0, 0.0] if norm == math.inf else [0.6, 0.8]
    assert parameter.grad.tolist() == pytest.approx(expected)
    return norm != math.inf


class TestWhoFollows:
    def test_each_function(self):
        gradients = [ref.random_gradient((40, 30), seed=1), ref.random_gradient((7,), seed=2)]
        norm = ref.reference_norm(gradients, 2.0)
        calls = {
            "clip_grad_norm_": lambda function, own: function(ref.parameters(own), 0.5),
            "clip_grad_value_": lambda function, own: function(ref.parameters(own), 0.5),
            "clip_grads_with_norm_": lambda function, own: function(ref.parameters(own), 0.5, norm),
            "get_total_norm": lambda function, own: function(own),
        }
        assert set(calls) == set(FUNCTIONS)
        for name, call in calls.items():
            direct, through_torch = ref.copies(gradients), ref.copies(gradients)
            expected = call(getattr(gradclip_ext, name), direct)
            with (
                patch(),
                torch.autograd.profiler.profile(use_device=None) as profile,
            ):
                found = call(IMPORTED_BEFORE[name], through_torch)
            assert f"gradclip_ext::{name}" in {event.name for event in profile.function_events}
            assert found is expected is None or torch.equal(found, expected)
            for one, other in zip(through_torch, direct, strict=True):
                assert torch.equal(one, other)

    def test_names_of_torch(self):
        with patch():
            for module in (torch.nn.utils, clip_grad):
                assert is_ours(module.clip_grad_norm_)
            with pytest.warns(FutureWarning):
                assert is_ours(torch.nn.utils.clip_grad_norm)
            # Of torch's own code that calls the private names.
            assert clip_grad._get_total_norm(torch.tensor([OVERFLOWING])).item() < math.inf

    def test_whatever_holds_the_function(self):
        class Trainer:
            clip = staticmethod(torch.nn.utils.clip_grad_norm_)

        names: dict = {}
        exec("from torch.nn.utils.clip_grad import *", names)
        holders = {
            "alias": IMPORTED_BEFORE["clip_grad_norm_"],
            "partial": functools.partial(torch.nn.utils.clip_grad_norm_, norm_type=2.0),
            "class attribute": Trainer.clip,
            "instance attribute": Trainer().clip,
            "star import": names["clip_grad_norm_"],
            "pickle": pickle.loads(pickle.dumps(torch.nn.utils.clip_grad_norm_)),
            "wrapper": functools.wraps(torch.nn.utils.clip_grad_norm_)(
                lambda *arguments: torch.nn.utils.clip_grad_norm_(*arguments)
            ),
        }
        for name, function in holders.items():
            assert not is_ours(function), name
            with patch():
                assert is_ours(function), name
            assert not is_ours(function), name

    def test_functions_stay_the_same_objects(self):
        before = {
            name: (function, function.__doc__, inspect.signature(function), pickle.dumps(function))
            for name, function in IMPORTED_BEFORE.items()
        }
        with patch():
            for name, (function, text, signature, pickled) in before.items():
                assert getattr(torch.nn.utils, name) is function
                assert function.__wrapped__ is ORIGINALS[name]
                assert function.__doc__ == text
                assert inspect.signature(function) == signature
                assert pickle.dumps(function) == pickled

    def test_mock_of_a_name(self):
        with patch():
            with mock.patch("torch.nn.utils.clip_grad_norm_") as mocked:
                torch.nn.utils.clip_grad_norm_([], 1.0)
            mocked.assert_called_once_with([], 1.0)
            assert is_ours(torch.nn.utils.clip_grad_norm_)
        with mock.patch("torch.nn.utils.clip_grad_norm_", wraps=torch.nn.utils.clip_grad_norm_):
            assert not is_ours(torch.nn.utils.clip_grad_norm_)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="cannot trace torch's own function either"
)
def test_compiled_function_follows():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def clip(parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def clip_and_check():
        weight = make_parameter((3.0, 4.0))
        assert clip([weight], 1.0).item() == 5.0
        assert weight.grad.tolist() == pytest.approx([0.6, 0.8])
        return len(graphs)

    try:
        assert clip_and_check() == 1
        with patch():
            # Compiled anew, then found again.
            assert clip_and_check() == 2
            assert clip_and_check() == 2
        assert clip_and_check() == 2
    finally:
        torch.compiler.reset()


class TestWhen:
    def test_until_unpatch(self):
        patch()
        assert is_ours()
        unpatch()
        assert not is_ours()

    def test_twice_is_once(self):
        patch()
        patch()
        unpatch()
        assert not is_ours()

    def test_block_in_a_block(self):
        with patch():
            with patch():
                assert is_ours()
            assert is_ours()
        assert not is_ours()

    def test_block_in_a_lasting_patch(self):
        patch()
        with patch():
            assert is_ours()
        assert is_ours()
        unpatch()
        assert not is_ours()

    def test_lasting_patch_in_a_block(self):
        with patch():
            patch()
        assert is_ours()
        unpatch()
        assert not is_ours()

    def test_one_object_for_several_blocks(self):
        patched = patch()
        for _ in range(2):
            with patched, patched:
                assert is_ours()
            assert not is_ours()

    def test_error_in_a_block(self):
        with pytest.raises(KeyError), patch():
            raise KeyError
        assert not is_ours()

    def test_overlapping_blocks_of_threads(self):
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with patch():
                entered.set()
                leave.wait(60)
                return is_ours()

        with ThreadPoolExecutor(1) as pool:
            with patch():
                held = pool.submit(hold)
                assert entered.wait(60)
            assert is_ours()
            leave.set()
            assert held.result()
        assert not is_ours()

    def test_threads_that_clip_meanwhile(self):
        stop = threading.Event()

        def clip():
            seen = set()
            while not stop.is_set():
                seen.add(is_ours())
            return seen

        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(clip) for _ in range(4)]
            # Until each of them may have met both, and every change in between.
            for _ in range(300):
                with patch():
                    assert is_ours()
            stop.set()
            assert all(result.result() <= {True, False} for result in results)
        assert not is_ours()

    def test_original_functions(self):
        with original_functions():
            assert not is_ours()
        with patch():
            with original_functions():
                assert not is_ours()
            assert is_ours()


class TestResults:
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, "inf", 0.0, 3.5, -1.0])
    @pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
    def test_as_torch(self, norm_type, max_norm):
        gradients = [ref.random_gradient((31, 9), seed=3), ref.random_gradient((5,), seed=4)]
        theirs, ours = ref.copies(gradients), ref.copies(gradients)
        clip = torch.nn.utils.clip_grad_norm_
        expected = clip(ref.parameters(theirs), max_norm, norm_type)
        with patch():
            found = clip(ref.parameters(ours), max_norm, norm_type)
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)

    def test_what_falls_back_to_torch_does_not_come_back(self):
        """A tensor subclass: our fallback calls torch's function, which calls ours."""

        class Subclass(torch.Tensor):
            pass

        gradient = torch.tensor([3.0, 4.0]).as_subclass(Subclass)
        with patch():
            for function in (torch.nn.utils.get_total_norm, gradclip_ext.get_total_norm):
                assert function([gradient], 3.0).item() == pytest.approx(91 ** (1 / 3))

    def test_autograd_is_off_as_in_torch(self):
        weight = make_parameter((3.0, 4.0))
        weight.grad.requires_grad_()
        with patch():
            norm = torch.nn.utils.clip_grad_norm_(weight, 1.0)
        assert (norm.requires_grad, weight.grad.grad_fn) == (False, None)
        assert torch.is_grad_enabled()

    def test_errors_are_ours(self):
        weight = make_parameter((3.0, 4.0))
        with patch(), pytest.raises(ValueError, match="max_norm has to be a number"):
            torch.nn.utils.clip_grad_norm_(weight, -1.0)
        assert weight.grad.tolist() == [3.0, 4.0]

    @pytest.mark.parametrize("patched", [False, True], ids=["torch", "patched"])
    def test_warning_points_at_the_callers_line(self, patched):
        def exhausted():
            yield from ()

        parameters = exhausted()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if patched:
                with patch():
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            gradclip_ext.clip_grad_norm_(parameters, 1.0)
        assert [str(warning.message) for warning in caught] == [
            "`parameters` is an empty generator, no gradient clipping will occur."
        ] * (1 + patched)
        start = inspect.getsourcelines(type(self))[1]
        assert all(warning.filename == __file__ for warning in caught)
        assert all(warning.lineno > start for warning in caught)
        with open(__file__, encoding="utf-8") as file:
            lines = file.read().splitlines()
        assert all("clip_grad_norm_(parameters, 1.0)" in lines[w.lineno - 1] for w in caught)


class TestSomethingElse:
    """What is not torch's function is neither replaced nor put back."""

    def assert_refused(self, message):
        with pytest.raises(RuntimeError) as error:
            patch()
        assert str(error.value).startswith(message)
        for name, function in IMPORTED_BEFORE.items():
            assert function.__closure__[0].cell_contents is ORIGINALS[name]
        with pytest.raises(RuntimeError, match="patch\\(\\) was not called"):
            unpatch()

    def test_unpatch_of_what_is_not_patched(self):
        with pytest.raises(RuntimeError) as error:
            unpatch()
        assert str(error.value) == (
            "unpatch: the functions of torch.nn.utils are torch's own, patch() was not called"
        )

    def test_unpatch_in_a_block(self):
        with patch():
            with pytest.raises(RuntimeError) as error:
                unpatch()
            assert is_ours()
        assert str(error.value) == (
            "unpatch: the functions of torch.nn.utils are patched by a `with patch():` block, "
            "which ends that by itself"
        )

    @pytest.mark.parametrize("module", [torch.nn.utils, clip_grad], ids=["public", "private"])
    def test_replaced_before(self, module, monkeypatch):
        @functools.wraps(clip_grad.clip_grad_norm_)
        def theirs(*arguments):
            raise NotImplementedError

        monkeypatch.setattr(module, "clip_grad_norm_", theirs)
        self.assert_refused(
            f"patch: torch.nn.utils.clip_grad_norm_ has been replaced by {__name__}.clip_grad_norm_"
        )
        assert module.clip_grad_norm_ is theirs

    def test_replaced_by_an_object(self):
        with mock.patch("torch.nn.utils.get_total_norm"):
            self.assert_refused(
                "patch: torch.nn.utils.get_total_norm has been replaced by <MagicMock"
            )

    def test_in_the_closure_before(self):
        def theirs(*arguments):
            raise NotImplementedError

        cell = IMPORTED_BEFORE["clip_grad_value_"].__closure__[0]
        cell.cell_contents = theirs
        try:
            with pytest.raises(RuntimeError, match=r"_value_ has been replaced by .*theirs"):
                patch()
            assert cell.cell_contents is theirs
        finally:
            cell.cell_contents = ORIGINALS["clip_grad_value_"]
        assert not is_ours()

    def test_in_the_closure_since(self):
        cell = IMPORTED_BEFORE["clip_grad_norm_"].__closure__[0]
        patch()
        ours = cell.cell_contents

        def theirs(*arguments):
            return ours(*arguments)

        cell.cell_contents = theirs
        with pytest.raises(RuntimeError) as error:
            unpatch()
        assert str(error.value).startswith(
            f"unpatch: torch.nn.utils.clip_grad_norm_ has been replaced since by {__name__}."
        )
        # None of the functions was put back.
        assert cell.cell_contents is theirs
        values = IMPORTED_BEFORE["clip_grad_value_"]
        assert values.__closure__[0].cell_contents is not ORIGINALS["clip_grad_value_"]
        cell.cell_contents = ours
        unpatch()
        assert not is_ours()

    def test_replaced_since_and_put_back_by_them(self, monkeypatch):
        """torch_xla replaces the name and keeps what it was bound to."""
        patch()
        kept = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: None)
        unpatch()
        assert torch.nn.utils.clip_grad_norm_([], 1.0) is None
        assert not is_ours(kept)

    def test_reloaded(self):
        before = dict(vars(clip_grad))
        try:
            importlib.reload(clip_grad)
            assert clip_grad.clip_grad_norm_ is not IMPORTED_BEFORE["clip_grad_norm_"]
            with patch():
                assert is_ours(clip_grad.clip_grad_norm_)
                assert is_ours(torch.nn.utils.clip_grad_norm_)
            assert not is_ours(clip_grad.clip_grad_norm_)
            assert not is_ours(torch.nn.utils.clip_grad_norm_)
        finally:
            vars(clip_grad).update(before)

    def test_reloaded_while_patched(self):
        before = dict(vars(clip_grad))
        try:
            with patch():
                importlib.reload(clip_grad)
                assert not is_ours(clip_grad.clip_grad_norm_)
                with patch():
                    assert is_ours(clip_grad.clip_grad_norm_)
            assert not is_ours(clip_grad.clip_grad_norm_)
            assert not is_ours(torch.nn.utils.clip_grad_norm_)
        finally:
            vars(clip_grad).update(before)


class TestNoClosures:
    """A torch whose functions are defined in another way."""

    @pytest.fixture
    def plain(self, monkeypatch):
        """The functions without their wrappers, by their public names."""
        functions = {}
        for name, original in ORIGINALS.items():
            copy = types.FunctionType(
                original.__code__, vars(clip_grad), name, original.__defaults__
            )
            copy.__name__ = original.__name__
            functions[name] = copy
            monkeypatch.setattr(torch.nn.utils, name, copy)
            monkeypatch.setattr(clip_grad, original.__name__, copy)
        return functions

    def test_names_are_replaced_with_a_warning(self, plain):
        with pytest.warns(UserWarning) as caught:
            patched = patch()
        assert len(caught) == len(FUNCTIONS)
        assert all(warning.filename == __file__ for warning in caught)
        assert str(caught[0].message).startswith(
            f"patch: torch.nn.utils.clip_grad_norm_ of torch {torch.__version__} is "
            "not the closure that earlier versions have"
        )
        with patched, patch():
            assert is_ours(torch.nn.utils.clip_grad_norm_)
            assert is_ours(clip_grad.clip_grad_norm_)
            with pytest.warns(FutureWarning):
                assert is_ours(torch.nn.utils.clip_grad_norm)
        for name, function in plain.items():
            assert getattr(torch.nn.utils, name) is function
            assert getattr(clip_grad, function.__name__) is function

    def test_replaced_since(self, plain):
        with pytest.warns(UserWarning):
            patch()
        ours = torch.nn.utils.clip_grad_norm_
        with mock.patch("torch.nn.utils.clip_grad_norm_") as theirs:
            with pytest.raises(RuntimeError, match="has been replaced since by <MagicMock"):
                unpatch()
            assert torch.nn.utils.clip_grad_norm_ is theirs
            assert clip_grad.clip_grad_norm_ is ours
        unpatch()
        assert torch.nn.utils.clip_grad_norm_ is plain["clip_grad_norm_"]
