// The tests of test_kernels_writing.cpp, for the main program.
#pragma once

namespace gradclip::cuda {

void test_quiet();
void test_given_numbers();
void test_given_dtypes();
void test_tiny_coefficients();
void test_one_block();
void test_scale_each();
void test_clamp();
void test_clip_rows();
void test_finish();

}  // namespace gradclip::cuda
