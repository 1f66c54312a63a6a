// Which tiles of out there are, found on the device from group_offsets.
//
// Every group is cut into tiles of kTileRows rows and kTileColumns columns, the
// last of which may stick out of the group and of out. Tiles are numbered group
// by group, and within a group row by row of a column of tiles, so that blocks
// that run at one time share a tile of the weight. A block takes the tiles
// blockIdx.x, blockIdx.x + gridDim.x, ...: the grid is as large as the device,
// whatever the offsets say.
//
// Each warp looks tiles up for itself, 32 groups at a time, and needs neither
// shared memory nor a barrier for it.

#ifndef XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_TILES_CUH_
#define XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_TILES_CUH_

#include <cstdint>

#include "xla_ops/cc/device/dtype.cuh"
#include "xla_ops/cc/device/reduce.cuh"

namespace xla_ops {

// What the kernels are given: GroupedMatmulParams in device terms.
template <typename T>
struct GroupedMatmulArgs {
  const T* input;                // [num_rows, depth]
  const T* weight;               // [num_groups, num_columns, depth]
  const int32_t* group_offsets;  // [num_groups + 1]; null: all rows
  const T* bias;                 // [num_columns], or null
  T* out;                        // [num_rows, num_columns]
  int64_t num_rows;
  int num_columns;
  int depth;
  int num_groups;
};

template <typename T>
__device__ __forceinline__ float BiasAt(const GroupedMatmulArgs<T>& args,
                                        int column) {
  return args.bias == nullptr || column >= args.num_columns
             ? 0.0f
             : ToFloat(args.bias[column]);
}

struct GroupedTile {
  int group;
  int first_row;  // of input and out
  int end_row;    // of the group
  int first_column;
};

template <int kTileRows, int kTileColumns>
class GroupedTiles {
 public:
  // All lanes of the warp make one of their own, and call it together.
  template <typename T>
  __device__ explicit GroupedTiles(const GroupedMatmulArgs<T>& args)
      : offsets_(args.group_offsets),
        num_groups_(args.num_groups),
        // Rows that no offset can name are rows of no group.
        num_rows_(static_cast<int>(args.num_rows < INT32_MAX ? args.num_rows
                                                             : INT32_MAX)),
        column_tiles_((args.num_columns + kTileColumns - 1) / kTileColumns) {
    first_row_ = Clamp(Offset(0), 0);
    end_row_ = first_row_;
    LoadGroups(0);
  }

  // Finds tile number `tile`, which must not be lower than in the last call.
  // False where there are fewer.
  __device__ bool Find(int64_t tile, GroupedTile* found) {
    while (tile >= tiles_end_) {
      if (first_group_ + 32 >= num_groups_) return false;
      LoadGroups(first_group_ + 32);
    }
    // The first group whose last tile comes after this one.
    const unsigned after = __ballot_sync(kFullWarp, tile < lane_tiles_end_);
    const int lane = __ffs(after) - 1;
    const int end = __shfl_sync(kFullWarp, lane_end_row_, lane);
    const int begin = __shfl_sync(kFullWarp, lane_first_row_, lane);
    const int64_t tiles_end = __shfl_sync(kFullWarp, lane_tiles_end_, lane);
    const int row_tiles = RowTiles(begin, end);
    const int in_group = static_cast<int>(
        tile - (tiles_end - int64_t{row_tiles} * column_tiles_));
    found->group = first_group_ + lane;
    found->first_row = begin + in_group % row_tiles * kTileRows;
    found->end_row = end;
    found->first_column = in_group / row_tiles * kTileColumns;
    return true;
  }

  // The first row of the first group, and the end of the last: once Find has
  // returned false.
  __device__ int FirstRow() const { return first_row_; }
  __device__ int EndRow() const { return end_row_; }

 private:
  // Without offsets there is one group, of all rows.
  __device__ int Offset(int group) const {
    if (offsets_ != nullptr) return offsets_[group];
    return group == 0 ? 0 : num_rows_;
  }
  __device__ int Clamp(int value, int low) const {
    return max(low, min(value, num_rows_));
  }
  __device__ static int RowTiles(int begin, int end) {
    return (end - begin + kTileRows - 1) / kTileRows;
  }

  // Takes the groups from `first` on into the lanes, one each.
  __device__ void LoadGroups(int first) {
    const int lane = threadIdx.x % 32;
    first_group_ = first;
    const int group = first + lane;
    const int before = end_row_;
    // A group beyond the last is empty. Offsets that do not ascend are held to
    // the highest before them.
    int end = Clamp(group < num_groups_ ? Offset(group + 1) : before, before);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, end, step);
      if (lane >= step) end = max(end, other);
    }
    int begin = __shfl_up_sync(kFullWarp, end, 1);
    if (lane == 0) begin = before;
    int64_t tiles = int64_t{RowTiles(begin, end)} * column_tiles_;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, tiles, step);
      if (lane >= step) tiles += other;
    }
    lane_first_row_ = begin;
    lane_end_row_ = end;
    lane_tiles_end_ = tiles_end_ + tiles;
    end_row_ = __shfl_sync(kFullWarp, end, 31);
    tiles_end_ = __shfl_sync(kFullWarp, lane_tiles_end_, 31);
  }

  const int32_t* offsets_;
  int num_groups_;
  int num_rows_;
  int column_tiles_;
  int first_row_;
  int first_group_ = 0;
  // Of this lane's group: its rows, and how many tiles there are up to its end.
  int lane_first_row_;
  int lane_end_row_;
  int64_t lane_tiles_end_;
  // Of the 32 groups' last.
  int end_row_;
  int64_t tiles_end_ = 0;
};

// Writes zeros to rows [0, first) and [end, num_rows), all blocks together.
template <typename T>
__device__ void WriteZeroRows(const GroupedMatmulArgs<T>& args, int first,
                              int end) {
  const int64_t columns = args.num_columns;
  const int64_t before = first * columns;
  const int64_t after = (args.num_rows - end) * columns;
  T* behind = args.out + end * columns;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       i < before + after; i += step) {
    (i < before ? args.out[i] : behind[i - before]) = T(0.0f);
  }
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_GROUPED_MATMUL_GROUPED_MATMUL_TILES_CUH_
