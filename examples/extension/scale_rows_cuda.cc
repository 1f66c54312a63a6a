// The CUDA handler of mine.scale_rows.

#include "scale_rows.h"
#include "scale_rows_checks.h"
#include "scale_rows_launch.h"
#include "xla_ops/cc/device/cuda_handler.h"

namespace mine {

XLA_OPS_CUDA_HANDLER(scale_rows, ScaleRowsBinding(), MakeScaleRowsParams,
                     LaunchScaleRows);

}  // namespace mine
