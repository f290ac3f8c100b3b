// Lets core functions be called from host code and from GPU kernels alike; plain C++ sees nothing.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GRADCLIP_HOST_DEVICE __host__ __device__
#else
#define GRADCLIP_HOST_DEVICE
#endif
