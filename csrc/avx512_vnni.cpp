// AVX-512 with VNNI: integers at full speed, bfloat16 rounded and multiplied as floats.
#include "avx512.h"

namespace paroattn {

Kernel avx512_vnni_kernel(Format qk, Format pv, int head_dim) {
  return narrowest_kernel(qk, pv, head_dim);
}

}  // namespace paroattn
