// PagedCopier: moves bytes between an engine's paged memory and slots. Lives where the paged memory is mapped (each worker);
// knows nothing of keys. After a store job it writes its rank's (generation, ok) word into each slot header: that, not the
// engine's report, is what publishing trusts.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lmcn/kv_layout.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

enum class CopyDirection : std::uint8_t { kGather /* paged -> slot */, kScatter /* slot -> paged */ };

/// One chunk (or part of one) of a job.
struct CopyItem {
  std::uint64_t slot_offset = 0;     // of the slot image in the arena
  std::uint32_t generation = 0;      // of the slot; a header with another generation fails the item
  std::uint32_t first_token = 0;     // in the chunk (opaque layouts: first block of the chunk)
  std::uint32_t tokens = 0;          // how many (opaque: blocks)
  std::uint32_t block_begin = 0;     // index into CopyJob::block_ids of the block that holds first_token
  std::uint32_t token_in_block = 0;  // where first_token lies in that block
};

struct CopyJob {
  std::uint64_t id = 0;  // caller's, unique among unfinished jobs
  CopyDirection direction = CopyDirection::kGather;
  std::vector<CopyItem> items = {};
  std::vector<std::int64_t> block_ids = {};  // engine block numbers; range-checked against num_blocks
  std::uint64_t stream = 0;                  // CUDA: the engine's cudaStream_t to order after (0: legacy default); host: ignored
  bool layer_by_layer = false;               // scatter only: layer after layer of all items, for wait_layers()
};

struct CopyDone {
  std::uint64_t id = 0;
  bool ok = false;
  std::uint64_t bytes = 0;
  double seconds = 0;  // from start of copying to end
  std::vector<std::uint32_t> failed_items;
  std::string message;  // why, when !ok
};

/// Thread-safe. submit() and poll() never wait for a copy. After a job, each distinct slot of it gets one word: a gather's (kOk
/// only when all of the job's items of that slot succeeded), or one load counted, also when it failed. A slot whose header
/// carries another generation belongs to someone else by now: neither its payload nor its words are touched. Should a device
/// fail so that the end of a copy cannot be established, the job fails and its slots get no word: they stay quarantined.
class PagedCopier {
 public:
  virtual ~PagedCopier() = default;  // waits for jobs under way
  /// kInvalidArgument (nothing is copied): block id, token range or slot offset out of bounds; duplicate id; a gather layer by
  /// layer; a gather by another rank than 0 where the ranks' KV is the same.
  virtual Status submit(CopyJob job) = 0;
  /// Jobs that ended since the last call; each exactly once.
  virtual std::vector<CopyDone> poll() = 0;
  /// Waits until none of `ids` is under way (unknown ids count as ended). Results still come through poll().
  virtual Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) = 0;
  /// For a job that was submitted with layer_by_layer: the leading `layers` layers of all its items are in place.
  /// Host: waits for that. CUDA: makes `stream` (a cudaStream_t; 0: legacy default) wait for it, and this thread only until the
  /// copies of these layers have been handed to the device, which takes as long as they do where the arena is not registered with
  /// CUDA. kOk also for a job that ended well, kAborted for one that failed, even when only later layers did: its result says more,
  /// and it may still be writing until it is polled. (Of ended jobs the last 1024 that were layer by layer are known.)
  /// kOk is of the bytes alone: whether the slots stayed theirs is checked once more at the end, and is in the job's result.
  /// kDeadlineExceeded. kNotFound: no such job. kInvalidArgument: not layer by layer, or more layers than there are.
  virtual Status wait_layers(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout, std::uint64_t stream) = 0;
  /// Makes these jobs end soon (unknown and ended ids are ignored) and returns at once: items not yet started, or on a CUDA device
  /// not yet submitted to the stream, fail with "cancelled" in the job's message; what was started runs to its end. A job still
  /// ends once, through poll(), and its slots get their words as those of any failed job. ok, when nothing was left to cancel.
  virtual void cancel(std::span<const std::uint64_t> ids) = 0;
  /// "host" | "cuda-PATH", or "cuda-PATH+PATH" where stores and loads go by different ones; PATH: "memcpy", "batch", "kernel" or
  /// "staged".
  virtual std::string name() const = 0;
  /// For a log, in one line: why these paths (the GB/s of each candidate), what fell back and why, how much of the arena is
  /// registered with CUDA by now. "" when there is nothing to say.
  virtual std::string details() const { return ""; }
};

struct CopierOptions {
  std::uint32_t rank = 0;
  bool replicated = false;                       // StoreOptions::replicated: loads read part 0, and of the ranks only rank 0 stores
  unsigned threads = 1;                          // host copier: copy threads
  std::int64_t non_temporal_bytes = 256 * 1024;  // gathers of runs whose job is at least this large bypass the cache
  // CUDA: bytes of a slot image, so that the arena is registered in pieces that hold whole slots. 0: not known; a slot that crosses
  // from one piece into the next is then copied by memcpy.
  std::uint64_t slot_bytes = 0;
};

/// Host implementation. `arena_base`/`arena_bytes`: the mapped arena, outlives the copier. The layout's memory too.
Result<std::unique_ptr<PagedCopier>> make_host_copier(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                                      std::uint64_t arena_bytes, const CopierOptions& options);
/// CUDA implementation; kUnavailable when built without CUDA or without a driver/device. How bytes move is measured here (some 50
/// ms, once for each device, driver and layout; kept in the user's cache folder), unless LMCN_COPY_PATH=memcpy|batch|kernel|staged
/// says it: another value is kInvalidArgument, a path that is not to be had here an error. The arena is registered with CUDA in the
/// background, once for all copiers of the process; copies work meanwhile, slower.
Result<std::unique_ptr<PagedCopier>> make_cuda_copier(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena_base,
                                                      std::uint64_t arena_bytes, const CopierOptions& options, int device);

}  // namespace lmcn
