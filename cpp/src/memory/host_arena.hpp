// The host arena: one memfd, mapped 2 MiB-aligned, populated and collapsed to huge pages in the background.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lmcn/status.hpp"

namespace lmcn {

struct ArenaOptions {
  std::uint64_t bytes = 0;           // hard limit; rounded down to 2 MiB; >= 2 MiB and <= what MemAvailable and the cgroups leave
  unsigned populate_threads = 2;     // background; 0: populate on first touch only
  bool huge_pages = true;            // hugetlb if reserved, else MADV_COLLAPSE step by step
  bool require_hugetlb = false;      // hugetlb or an error; includes huge_pages
  std::vector<int> numa_nodes = {};  // memory/numa.hpp: where its pages come from; empty: the kernel's choice
};

struct ArenaStats {
  std::uint64_t bytes = 0;
  std::uint64_t populated_bytes = 0;  // by the background threads so far
  std::uint64_t huge_bytes = 0;       // of those, backed by huge pages: hugetlb, or MADV_COLLAPSE reported success for them
  bool populate_done = false;
};

/// Owner's side. Opening returns at once whatever the size; background threads (nice 10) never block users of the memory, which
/// reads as zeros until written, populated or not. populate_done with populated_bytes < bytes: the kernel had no more memory.
/// Pages that something pinned before (a CUDA or io_uring registration) cannot become huge: register after wait_populated(), or
/// live with 4 KiB pages there. The memfd disappears with the last process that maps it. Sealed: nobody can change its size. Not in
/// core dumps. Thread-safe. fork(): a child inherits mapping and descriptor (and so keeps the memory while it lives and does not
/// exec) but not the background threads; destroying the arena there unmaps it in the child alone.
class HostArena {
 public:
  /// kInvalidArgument: fewer than 2 MiB, or more than is available (both numbers and what limits it in the message), or a NUMA node
  /// that does not exist. require_hugetlb: kResourceExhausted says how many pages to reserve, kUnavailable that the kernel has
  /// none.
  static Result<std::unique_ptr<HostArena>> create(const ArenaOptions& options);
  virtual ~HostArena() = default;  // stops the background threads, unmaps

  virtual std::byte* base() noexcept = 0;
  virtual std::uint64_t bytes() const noexcept = 0;
  virtual int memfd() const noexcept = 0;  // owned by the arena
  virtual ArenaStats stats() const noexcept = 0;
  /// Blocks until the background population ended (tests, benchmarks).
  virtual void wait_populated() noexcept = 0;
};

/// Worker's side: the same memory, mapped 2 MiB-aligned from a received descriptor (which it takes over, and closes, whatever the
/// outcome). kInvalidArgument: not a sealed memfd of exactly `bytes`.
class MappedArena {
 public:
  static Result<std::unique_ptr<MappedArena>> map(int memfd, std::uint64_t bytes);
  ~MappedArena();
  MappedArena(const MappedArena&) = delete;
  MappedArena& operator=(const MappedArena&) = delete;
  std::byte* base() noexcept { return base_; }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  MappedArena(std::byte* base, std::uint64_t bytes) : base_(base), bytes_(bytes) {}
  std::byte* base_;
  std::uint64_t bytes_;
};

}  // namespace lmcn
