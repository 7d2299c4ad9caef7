// A tensor's memory as Python hands it over.
#pragma once
#include <cstdint>

namespace egrsd {

using Address = uintptr_t;  // 0 stands for a tensor that is not given

template <class T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

}  // namespace egrsd
