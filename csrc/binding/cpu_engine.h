// The engine for tensors in the CPU's memory, on torch's own threads.
#pragma once

#include "binding/engine.h"

namespace gradclip::binding {

const Engine& cpu_engine();

}  // namespace gradclip::binding
