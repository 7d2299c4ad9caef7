// A cudaError_t as an exception of Python's.
#pragma once
#include <stdexcept>
#include <string>

#include "../cuda/kernels.h"

namespace egrsd {

inline void check(int error) {
  if (error) throw std::runtime_error(std::string("CUDA kernel failed: ") + cuda::error_name(error));
}

}  // namespace egrsd
