// Sums over the GPUs of one host, each rank reading what the others have in memory that all of them map. No NVLink multicast.
// Reference: quantkit/comm.py: _ordered_sum. Every rank gets the same bits: sums are made in rank order, in float32.
#pragma once
#include "quantkit.h"

#define QK_MAX_RANKS 8
#define QK_EXCHANGE_CHANNELS 64         // blocks of a launch at most, each with memory and counters of its own
#define QK_EXCHANGE_CHANNEL_BYTES 65536 // of a rank's data that a channel takes
#define QK_EXCHANGE_FLAGGED_BYTES 4096  // the same, where data and flags go together
#define QK_FP32 2                       // beside QkType

enum QkExchange { QK_FLAGGED = 0, QK_ONE_SHOT = 1, QK_TWO_SHOT = 2 };

#ifdef __cplusplus
extern "C" {
#endif

// A rank's buffer is quantkit_exchange_bytes(ranks) long, 16-byte aligned, and zero before any rank's first call but for what
// quantkit_exchange_begin writes. Exchanges of a group run in one order on every rank, one at a time (on one stream, or in graphs on it).
typedef struct QkPeers {
  void* buffers[QK_MAX_RANKS];  // every rank's buffer, as this rank sees it
  int32_t rank, ranks;
  uint64_t patience;  // nanoseconds that a rank may be late; then the kernel traps
} QkPeers;

int64_t quantkit_exchange_bytes(int ranks);

// The most bytes of x that one call of a mode takes.
int64_t quantkit_exchange_limit(int mode);

// Let the counters of this rank's buffer start at `call`, the same on every rank: they wrap, and this is how that is tested.
int quantkit_exchange_begin(const QkPeers* peers, uint32_t call, cudaStream_t stream);

// out = the sum of every rank's x: `bytes` of fp16, bf16 (QkType) or QK_FP32, both 16-byte aligned, not overlapping; mode a QkExchange.
int quantkit_all_reduce(const QkPeers* peers, const void* x, void* out, int64_t bytes, int type, int mode, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
