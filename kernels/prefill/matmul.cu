// quantkit_matmul_wgmma: checks a call and hands it to its format's kernels.
//
// QkConfig: a = rows of y in a tile, b = warpgroups (64 rows of W each), c = 0: persistent, stream-K over the last one to two rounds of tiles;
// -2: over the last, partial round alone; -3: the same, but all who share a tile add up a part of it; -1: whole tiles only; 1 to 8: a cluster of c blocks shares K. d: bit 0: clusters of two share x by multicast (c <= 0 only); bit 1: programmatic dependent
// launch, in which W is read before the kernel before has ended.
#include "launch.cuh"

namespace {

// Without a table of measurements: tiles as high as m asks for; where they are too few for the multiprocessors, clusters share K.
QkConfig rule(const qk::Call& call) {
  const int64_t m = call.work.m, strips = (call.work.strips + 1) / 2, few = qk::processors();
  QkConfig config = {QK_WGMMA, 16, 2, -1, 2};
  while (config.a < m && config.a < 256) config.a *= 2;
  if (config.a == 256 && (m + 255) / 256 * strips * 10 < few * 8) config.a = 128;
  const int64_t tiles = (m + config.a - 1) / config.a * strips, room = config.a <= 64 ? 2 * few : few;
  if (tiles > room) return config;
  for (config.c = 8; config.c > 1; --config.c) {  // a cluster lies within a group of 16 to 18 multiprocessors
    if (tiles * config.c * 10 <= room * 8 && 2 * config.c <= call.work.k_tiles) break;
  }
  return config;
}

}  // namespace

extern "C" int quantkit_matmul_wgmma(const QkWeight* weight, const void* x, int64_t m, int64_t ldx, int x_type, const void* bias, void* y,
                                     void* workspace, int64_t workspace_bytes, const QkConfig* config, cudaStream_t stream) {
  using namespace qk;
  if (weight->n <= 0 || weight->k <= 0 || m < 0 || m > INT32_MAX) return QK_UNSUPPORTED;
  if (m == 0) return 0;
  if (ldx % 8 || reinterpret_cast<uintptr_t>(x) % 16) return QK_UNSUPPORTED;  // a tensor map's strides and base are multiples of 16 bytes
  Call call = {};
  call.work.weight = *weight;
  call.work.tiles = static_cast<const uint8_t*>(weight->tiles);
  call.work.bias = bias;
  call.work.y = y;
  call.work.counters = static_cast<uint32_t*>(workspace);
  call.work.slots = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + QK_COUNTER_BYTES);
  call.work.n = weight->n;
  call.work.m = m;
  call.work.strips = static_cast<int>((weight->n + ROWS - 1) / ROWS);
  const int columns = tile_columns(weight->format);
  call.work.k_tiles = static_cast<int>((weight->k + columns - 1) / columns);
  call.work.mixed = weight->scale_type != x_type;
  call.x = x;
  call.x_type = x_type;
  call.ldx = ldx;
  call.k = weight->k;
  call.workspace_bytes = workspace_bytes;
  call.stream = stream;
  const QkConfig chosen = config && config->kernel == QK_WGMMA ? *config : rule(call);
  call.m_tile = chosen.a;
  call.groups = chosen.b & 255;
  call.workers = chosen.b >> 8;
  call.splits = chosen.c > 0 ? chosen.c : 0;
  call.whole = chosen.c == -1;
  call.late = chosen.c == -2;
  call.even = chosen.c == -3;
  call.pair = chosen.d & 1;
  call.dependent = chosen.d & 2;
  switch (weight->format) {
    case QK_INT4: return prefill_int4(call);
#ifndef QK_ONLY_INT4
    case QK_INT4Z: return prefill_int4z(call);
    case QK_NF4: return prefill_nf4(call);
    case QK_NF4N: return prefill_nf4n(call);
    case QK_Q4_K: return prefill_q4_k(call);
    case QK_Q5_K: return prefill_q5_k(call);
    case QK_Q6_K: return prefill_q6_k(call);
    case QK_Q8_0: return prefill_q8_0(call);
#endif
    default: return QK_UNSUPPORTED;
  }
}
