#pragma once
// What a forgotten atomic looks like: mutation tests put these in place of CUDA's.
#include <type_traits>

namespace plain {

template <class T>
using Same = std::common_type_t<T>;

template <class T, class Update>
T update(T* address, Update new_value) {
  const T old = *address;
  *address = new_value(old);
  return old;
}

template <class T>
T atomicAdd(T* p, Same<T> v) {
  return update(p, [=](T old) { return old + v; });
}
template <class T>
T atomicSub(T* p, Same<T> v) {
  return update(p, [=](T old) { return old - v; });
}
template <class T>
T atomicMax(T* p, Same<T> v) {
  return update(p, [=](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* p, Same<T> v) {
  return update(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicOr(T* p, Same<T> v) {
  return update(p, [=](T old) { return old | v; });
}
template <class T>
T atomicAnd(T* p, Same<T> v) {
  return update(p, [=](T old) { return old & v; });
}
template <class T>
T atomicXor(T* p, Same<T> v) {
  return update(p, [=](T old) { return old ^ v; });
}
template <class T>
T atomicExch(T* p, Same<T> v) {
  return update(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, Same<T> expected, Same<T> v) {
  return update(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return update(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

}  // namespace plain
