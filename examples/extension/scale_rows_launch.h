// The door between C++ and CUDA code: nvcc need not read XLA's headers.

#ifndef MINE_SCALE_ROWS_LAUNCH_H_
#define MINE_SCALE_ROWS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "scale_rows.h"

namespace mine {

// Queues the kernel. XLA may capture the stream into a CUDA graph, so it
// must not allocate, wait or read device memory.
cudaError_t LaunchScaleRows(cudaStream_t stream, const ScaleRowsParams& params);

}  // namespace mine

#endif  // MINE_SCALE_ROWS_LAUNCH_H_
