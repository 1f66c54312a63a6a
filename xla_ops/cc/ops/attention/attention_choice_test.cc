// Tests which CUDA kernel takes a call: from shapes, types, addresses, the
// device and the code that was built for it to the kernel's name.

#include "xla_ops/cc/ops/attention/attention_choice.h"

#include <cstdint>
#include <string>

#include "xla_ops/cc/core/dtype.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

// An address that is never read.
const void* At(uintptr_t address) {
  return reinterpret_cast<const void*>(address);
}

AttentionDevice Hopper() {
  AttentionDevice device = {};
  device.capability = 90;
  device.multiprocessors = 132;
  device.has_wgmma = true;
  device.has_mma = true;
  return device;
}

AttentionDevice Ampere() {
  AttentionDevice device = Hopper();
  device.capability = 80;
  device.has_wgmma = false;
  return device;
}

AttentionDevice Turing() {
  AttentionDevice device = Ampere();
  device.capability = 75;
  device.has_mma = false;
  return device;
}

// A prefill of 4 x 1024 tokens from pages.
AttentionParams Paged() {
  AttentionParams params = {};
  params.op = AttentionOp::kPagedAttention;
  params.dtype = params.kv_dtype = DType::kBF16;
  params.num_tokens = 4096;
  params.num_heads = 32;
  params.num_kv_heads = 8;
  params.head_dim = 128;
  params.max_num_seqs = 4;
  params.paged = true;
  params.num_blocks = 1024;
  params.page_size = 16;
  params.max_blocks = 64;
  params.num_splits = 1;
  params.head_stride = 128;
  params.page_stride = 8 * 128;
  params.block_stride = 16 * 8 * 128;
  params.query = At(0x1000);
  params.key = At(0x2000);
  params.value = At(0x3000);
  params.out = const_cast<void*>(At(0x4000));
  return params;
}

// The same from rows.
AttentionParams Contiguous() {
  AttentionParams params = Paged();
  params.op = AttentionOp::kFlashAttnVarlen;
  params.paged = false;
  params.num_blocks = 1;
  params.page_size = 4096;
  params.max_blocks = 0;
  params.block_stride = 0;
  return params;
}

// A decode step of `seqs` sequences.
AttentionParams Decode(int64_t seqs) {
  AttentionParams params = Paged();
  params.num_tokens = params.max_num_seqs = seqs;
  return params;
}

std::string Chosen(const AttentionParams& params,
                   const AttentionDevice& device) {
  return Name(ChooseAttentionKernel(params, device));
}

// The kernel on Hopper of a call that `change` has altered.
template <typename F>
std::string Changed(F&& change) {
  AttentionParams params = Paged();
  change(params);
  return Chosen(params, Hopper());
}

XLA_OPS_TEST(TheBestKernelOfEachDevice) {
  for (const AttentionParams& params : {Paged(), Contiguous()}) {
    EXPECT_EQ(Chosen(params, Hopper()), "sm90");
    EXPECT_EQ(Chosen(params, Ampere()), "mma");
    EXPECT_EQ(Chosen(params, Turing()), "simt");
    AttentionDevice blackwell = Hopper();
    blackwell.capability = 100;
    EXPECT_EQ(Chosen(params, blackwell), "mma");
    AttentionDevice built_without_9_0a = Hopper();
    built_without_9_0a.has_wgmma = false;
    EXPECT_EQ(Chosen(params, built_without_9_0a), "mma");
  }
}

XLA_OPS_TEST(WhatAKernelCannotDoTheNextOneDoes) {
  AttentionParams params = Paged();
  const AttentionDevice device = Hopper();
  const AttentionKernel first = ChooseAttentionKernel(params, device);
  const AttentionKernel second = NextAttentionKernel(first, params, device);
  const AttentionKernel third = NextAttentionKernel(second, params, device);
  EXPECT_EQ(std::string(Name(first)), "sm90");
  EXPECT_EQ(std::string(Name(second)), "mma");
  EXPECT_EQ(std::string(Name(third)), "simt");
  EXPECT_EQ(std::string(Name(NextAttentionKernel(third, params, device))),
            "none");
}

XLA_OPS_TEST(TypesThatHopperDoesNotTake) {
  EXPECT_EQ(
      Changed([](AttentionParams& p) { p.dtype = p.kv_dtype = DType::kF16; }),
      "sm90");
  EXPECT_EQ(Changed([](AttentionParams& p) { p.kv_dtype = DType::kF8E4M3FN; }),
            "mma");
  EXPECT_EQ(
      Changed([](AttentionParams& p) { p.dtype = p.kv_dtype = DType::kF32; }),
      "simt");
}

XLA_OPS_TEST(RowsOfTheAverageSequence) {
  // 4 query heads a KV head: 64 rows are 16 tokens.
  const auto kernel = [](int64_t tokens, int64_t seqs) {
    return Changed([=](AttentionParams& p) {
      p.num_tokens = tokens;
      p.max_num_seqs = seqs;
    });
  };
  EXPECT_EQ(kernel(64, 64), "mma");
  EXPECT_EQ(kernel(256, 64), "mma");
  EXPECT_EQ(kernel(257, 64), "mixed");
  EXPECT_EQ(kernel(16383, 64), "mixed");
  EXPECT_EQ(kernel(16384, 64), "sm90");
  // One sequence is the average.
  EXPECT_EQ(kernel(16, 1), "sm90");
  EXPECT_EQ(kernel(15, 1), "mma");
}

XLA_OPS_TEST(RowsOfATileByMmaSync) {
  // 4 query heads on each of 8 KV heads: 4096 tokens are 128 tiles of 128 rows
  // a KV head.
  const auto rows = [](int64_t tokens, int64_t seqs, int64_t head_dim = 128,
                       int64_t splits = 1, int16_t multiprocessors = 108) {
    AttentionParams params = Paged();
    params.num_tokens = tokens;
    params.max_num_seqs = seqs;
    params.head_dim = head_dim;
    params.num_splits = splits;
    AttentionDevice device = Ampere();
    device.multiprocessors = multiprocessors;
    return MmaTileRows(params, device);
  };
  for (const int64_t head_dim : {64, 96, 128}) {
    EXPECT_EQ(rows(4096, 4, head_dim), 128);
  }
  for (const int64_t head_dim : {136, 256}) {
    EXPECT_EQ(rows(4096, 4, head_dim), 64);
  }
  // The average sequence: 16 rows and less are decode, from 128 on it fills a
  // tile.
  EXPECT_EQ(rows(256, 64), 16);
  EXPECT_EQ(rows(257, 64), 64);
  EXPECT_EQ(rows(2047, 64), 64);
  EXPECT_EQ(rows(2048, 64), 128);
  EXPECT_EQ(rows(2048, 64, 256), 64);
  // More tiles than multiprocessors.
  EXPECT_EQ(rows(447, 1), 64);
  EXPECT_EQ(rows(448, 1), 128);
  EXPECT_EQ(rows(448, 1, 128, 1, 112), 64);
  EXPECT_EQ(rows(224, 1), 64);
  EXPECT_EQ(rows(224, 1, 128, 2), 128);
  EXPECT_EQ(rows(1, 0), 64);
}

XLA_OPS_TEST(SplitsDoNotChangeTheKernel) {
  const auto chunk = [](AttentionParams& p) {
    p.num_tokens = 512;
    p.max_num_seqs = 1;
    p.num_splits = 4;
  };
  EXPECT_EQ(Changed(chunk), "sm90");
  EXPECT_EQ(Changed([&](AttentionParams& p) {
              chunk(p);
              p.max_num_seqs = 65;
            }),
            "mixed");
}

XLA_OPS_TEST(BothKernelsHaveToTakeAMixedCall) {
  AttentionParams params = Paged();
  params.max_num_seqs = 64;
  EXPECT_EQ(Chosen(params, Hopper()), "mixed");
  EXPECT_EQ(Chosen(params, Ampere()), "mma");
  AttentionDevice without_mma = Hopper();
  without_mma.has_mma = false;
  EXPECT_EQ(Chosen(params, without_mma), "sm90");
  params.kv_dtype = DType::kF8E4M3FN;
  EXPECT_EQ(Chosen(params, Hopper()), "mma");
}

XLA_OPS_TEST(PagesThatTmaCannotCopy) {
  const auto page = [](int64_t size) {
    return Changed([size](AttentionParams& p) { p.page_size = size; });
  };
  EXPECT_EQ(page(48), "sm90");
  EXPECT_EQ(page(256), "sm90");
  EXPECT_EQ(page(8), "mma");
  EXPECT_EQ(page(24), "mma");
}

XLA_OPS_TEST(AddressesAndStrides) {
  const void* const odd = At(0x1008);
  EXPECT_EQ(Changed([&](AttentionParams& p) { p.query = odd; }), "simt");
  EXPECT_EQ(Changed([&](AttentionParams& p) { p.key = odd; }), "simt");
  EXPECT_EQ(Changed([&](AttentionParams& p) { p.value = odd; }), "simt");
  EXPECT_EQ(
      Changed([&](AttentionParams& p) { p.out = const_cast<void*>(odd); }),
      "simt");
  EXPECT_EQ(Changed([](AttentionParams& p) { p.head_stride = 132; }), "simt");
  EXPECT_EQ(Changed([](AttentionParams& p) { p.head_dim = 40; }), "sm90");
  // 8-bit rows of 40 bytes do not start on 16.
  EXPECT_EQ(Changed([](AttentionParams& p) {
              p.head_dim = 40;
              p.kv_dtype = DType::kF8E5M2;
            }),
            "simt");
  // A step of TMA is positive and below 2^40 bytes, of 8 tokens too; one from
  // a dimension's only element is never taken.
  EXPECT_EQ(Changed([](AttentionParams& p) { p.block_stride = 0; }), "mma");
  EXPECT_EQ(
      Changed([](AttentionParams& p) { p.block_stride = int64_t{1} << 36; }),
      "mma");
  EXPECT_EQ(Changed([](AttentionParams& p) {
              p.num_blocks = 1;
              p.block_stride = 0;
            }),
            "sm90");
}

XLA_OPS_TEST(NumbersThatHopperCannotAdd) {
  EXPECT_EQ(Changed([](AttentionParams& p) {
              p.num_tokens = kSm90MaxTokens / p.num_heads;
            }),
            "mma");
  EXPECT_EQ(Changed([](AttentionParams& p) {
              p.num_splits = kSm90MaxTokens / (p.num_heads * p.num_tokens);
            }),
            "mma");
  EXPECT_EQ(Changed([](AttentionParams& p) {
              p.max_blocks = kSm90MaxTokens / p.page_size;
            }),
            "mma");
  EXPECT_EQ(
      Changed([](AttentionParams& p) { p.num_blocks = int64_t{1} << 31; }),
      "mma");
  // Of which the product would not fit in 64 bits.
  EXPECT_EQ(
      Changed([](AttentionParams& p) { p.max_blocks = int64_t{1} << 60; }),
      "mma");
}

XLA_OPS_TEST(NothingToAttendTo) {
  EXPECT_EQ(Changed([](AttentionParams& p) { p.num_blocks = 0; }), "mma");
  EXPECT_EQ(Changed([](AttentionParams& p) { p.max_num_seqs = 0; }), "mma");
  EXPECT_EQ(Changed([](AttentionParams& p) { p.page_size = 0; }), "mma");
}

XLA_OPS_TEST(LongestSequence) {
  AttentionParams params = Paged();
  EXPECT_EQ(MaxKvLength(params), 64 * 16);
  params.max_blocks = int64_t{1} << 60;
  EXPECT_EQ(MaxKvLength(params), INT32_MAX);
  params.max_blocks = 0;
  EXPECT_EQ(MaxKvLength(params), 0);
  EXPECT_EQ(MaxKvLength(Contiguous()), 4096);
}

XLA_OPS_TEST(DebugModeNamesTheKernel) {
  EXPECT_EQ(DescribeChoice(AttentionKernel::kSm90, Paged()),
            "xla_ops: paged_attention: kernel sm90 for query bfloat16 [4096, "
            "32, 128], 8 KV heads bfloat16, 4 sequences, page_size 16, 1 "
            "split");
  AttentionParams params = Contiguous();
  params.num_splits = 8;
  params.kv_dtype = DType::kF8E4M3FN;
  EXPECT_EQ(DescribeChoice(AttentionKernel::kMma, params),
            "xla_ops: flash_attn_varlen: kernel mma for query bfloat16 [4096, "
            "32, 128], 8 KV heads float8_e4m3fn, 4 sequences, contiguous, 8 "
            "splits");
}

XLA_OPS_TEST(SplitsOfFewSequencesAreClusters) {
  AttentionDevice device = Hopper();
  EXPECT_EQ(ClusterSplits(Decode(1), device, 16), 0);
  device.has_clusters = true;
  for (const int splits : {2, 4, 8, 16}) {
    EXPECT_EQ(ClusterSplits(Decode(1), device, splits), splits);
    EXPECT_EQ(ClusterSplits(Decode(2), device, splits), splits);
    EXPECT_EQ(ClusterSplits(Decode(3), device, splits), 0);
  }
  // Twice as many as a cluster has.
  EXPECT_EQ(ClusterSplits(Decode(1), device, 32), 16);
  EXPECT_EQ(ClusterSplits(Decode(1), device, 64), 0);
  for (const int splits : {0, 1, 3, 12, 24}) {
    EXPECT_EQ(ClusterSplits(Decode(1), device, splits), 0);
  }
  // Of one KV head a cluster is alone: it keeps its splits or has none.
  AttentionParams one_head = Decode(1);
  one_head.num_heads = 8;
  one_head.num_kv_heads = 1;
  EXPECT_EQ(ClusterSplits(one_head, device, 16), 16);
  EXPECT_EQ(ClusterSplits(one_head, device, 32), 0);
  one_head.num_tokens = one_head.max_num_seqs = 16;
  EXPECT_EQ(ClusterSplits(one_head, device, 32), 16);
  one_head.num_tokens = one_head.max_num_seqs = 17;
  EXPECT_EQ(ClusterSplits(one_head, device, 32), 0);
  // A few tokens of one sequence are one tile.
  AttentionParams draft = Decode(1);
  draft.num_tokens = 4;
  EXPECT_EQ(ClusterSplits(draft, device, 16), 16);
  // A prefill has other kernels.
  EXPECT_EQ(ClusterSplits(Paged(), device, 16), 0);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
