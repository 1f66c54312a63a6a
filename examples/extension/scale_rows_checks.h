// The operands of scale_rows, the same for every platform.

#ifndef MINE_SCALE_ROWS_CHECKS_H_
#define MINE_SCALE_ROWS_CHECKS_H_

#include "scale_rows.h"
#include "xla/ffi/api/ffi.h"

namespace mine {

namespace ffi = ::xla::ffi;

inline auto ScaleRowsBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()   // input
      .Arg<ffi::AnyBuffer>()   // scale
      .Ret<ffi::AnyBuffer>();  // out
}

ffi::Error MakeScaleRowsParams(ffi::AnyBuffer input, ffi::AnyBuffer scale,
                               ffi::Result<ffi::AnyBuffer> out,
                               ScaleRowsParams* params);

}  // namespace mine

#endif  // MINE_SCALE_ROWS_CHECKS_H_
