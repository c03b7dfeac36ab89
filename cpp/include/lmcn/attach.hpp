// A worker's way to the arena of the process that owns the store (TieredStore::serve).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "lmcn/status.hpp"

namespace lmcn {

/// The owner's arena, mapped here. Destroying it unmaps and closes the connection, which tells the owner that the rank is gone.
class ArenaAttachment {
 public:
  /// Retries until `deadline`: the owner may start later than its workers. kDeadlineExceeded names the socket path.
  /// kInvalidArgument: the owner expects other rank_bytes, has fewer ranks, or differs in `replicated` (both values in the
  /// message): whether all ranks share one part of a slot (StoreOptions::replicated). kUnsupported: it is another build's. kLocked:
  /// another process was attached as this rank until the deadline.
  static Result<std::unique_ptr<ArenaAttachment>> attach(const std::string& engine_id, std::uint32_t rank, std::uint64_t rank_bytes,
                                                         std::chrono::milliseconds deadline, bool replicated = false);
  virtual ~ArenaAttachment() = default;
  virtual std::byte* base() noexcept = 0;
  virtual std::uint64_t bytes() const noexcept = 0;
  virtual std::uint32_t owner_pid() const noexcept = 0;
};

}  // namespace lmcn
