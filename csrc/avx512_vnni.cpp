// AVX-512 with VNNI: integers at full speed, bfloat16 rounded and multiplied as floats.
#include "avx512.h"

namespace paroattn {

Kernel avx512_vnni_kernel(Format qk, Format pv, int head_dim) {
  return head_dim <= 64 ? kernel_for_formats<64>(qk, pv) : kernel_for_formats<128>(qk, pv);
}

}  // namespace paroattn
