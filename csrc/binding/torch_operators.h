// Operators of torch's dispatcher, which a graph of torch.compile can hold and call.
#pragma once

namespace gradclip::binding {

// Registers them, once in a process. Raises if another library has done so.
void register_torch_operators();

}  // namespace gradclip::binding
