#include "avx512.h"

#include "attention.h"

namespace hf {

const Kernels kAvx512 = make_kernels<ByShape<Avx512>>("avx512");

} // namespace hf
