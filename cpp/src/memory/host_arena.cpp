#include "memory/host_arena.hpp"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <set>
#include <system_error>
#include <thread>
#include <vector>

#include "base/seq_points.hpp"
#include "memory/arena_mapping.hpp"
#include "memory/memory_limits.hpp"
#include "memory/numa.hpp"
#include "memory/unique_fd.hpp"

namespace lmcn {
namespace {

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

// What the background threads do between two looks at the stop flag: 5 to 30 ms.
constexpr std::uint64_t kStepBytes = 16ull << 20;
constexpr std::uint64_t kSmallPageBytes = 4096;
constexpr unsigned kMaxThreads = 64;
// Behind the engine's threads, but not so far that one of ours, holding a page lock, waits long for a busy CPU.
constexpr int kNice = 10;

struct Memory {
  UniqueFd fd;
  std::byte* base = nullptr;
  bool hugetlb = false;
};

Result<Memory> make_memory(std::uint64_t bytes, unsigned flags) {
  Memory memory;
  memory.hugetlb = (flags & MFD_HUGETLB) != 0;
  memory.fd.reset(::memfd_create("lmcn-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING | flags));
  if (!memory.fd.valid()) return Status::from_errno(errno, "memfd_create of the host arena");
  if (::ftruncate(memory.fd.get(), static_cast<off_t>(bytes)) != 0) {
    return Status::from_errno(errno, "ftruncate of the host arena to " + std::to_string(bytes) + " bytes");
  }
  // No process can change its size, nor forbid others to map it.
  if (::fcntl(memory.fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return Status::from_errno(errno, "F_ADD_SEALS on the host arena");
  }
  auto base = map_shared_aligned(memory.fd.get(), bytes);
  if (!base.ok()) return base.status();
  memory.base = *base;
  return memory;
}

// Mapping reserves hugetlb pages: it fails here, and not with SIGBUS later, when too few are free.
Result<Memory> make_hugetlb(std::uint64_t bytes) {
  return make_memory(bytes, MFD_HUGETLB | MFD_HUGE_2MB);
}

Status hugetlb_refused(std::uint64_t bytes, const Status& why) {
  const HugePages pages = huge_pages_of_2mib();
  const std::uint64_t needed = bytes / kHugePageBytes;
  const std::string have = "host arena: hugetlb=true needs " + std::to_string(needed) + " huge pages of 2 MiB, " +
                           std::to_string(pages.free) + " of " + std::to_string(pages.total) + " are free";
  if (why.sys_errno() != ENOMEM && why.sys_errno() != ENOSPC)
    return {Code::kUnavailable, have + "; " + why.message(), why.sys_errno()};
  const std::uint64_t in_use = pages.total - pages.free;
  return {Code::kResourceExhausted,
          have + ": reserve them with `sysctl vm.nr_hugepages=" + std::to_string(in_use + needed) +
              "` (/proc/sys/vm/nr_hugepages), early after boot, or set hugetlb=false",
          why.sys_errno()};
}

Status check_available(std::uint64_t bytes) {
  const AvailableMemory available = available_memory();
  if (bytes <= available.bytes) return {};
  return {Code::kInvalidArgument, "host arena: bytes is " + std::to_string(bytes) + ", available are " +
                                      std::to_string(available.bytes) + " (" + available.source + ")"};
}

class MemfdArena final : public HostArena {
 public:
  MemfdArena(Memory memory, const ArenaOptions& options, std::uint64_t bytes)
      : fd_(std::move(memory.fd)),
        base_(memory.base),
        bytes_(bytes),
        hugetlb_(memory.hugetlb),
        nodes_(std::set<int>(options.numa_nodes.begin(), options.numa_nodes.end()).size()),
        collapse_(options.huge_pages && !hugetlb_) {}

  ~MemfdArena() override {
    if (::getpid() != pid_) {
      // A forked child has no such threads: nothing to join, and their handles must not be destroyed.
      new std::vector<std::thread>(std::move(threads_));  // NOLINT: leaked on purpose
    } else {
      stop_.store(true, std::memory_order_relaxed);
      LMCN_SEQ_POINT("memory.arena.stopping");
      for (std::thread& thread : threads_) thread.join();
    }
    ::munmap(base_, bytes_);
  }

  Status start(unsigned threads) {
    const std::uint64_t steps = (bytes_ + kStepBytes - 1) / kStepBytes;
    threads = static_cast<unsigned>(std::min<std::uint64_t>({threads, kMaxThreads, steps}));
    running_ = threads;
    threads_.reserve(threads);
    for (unsigned i = 0; i < threads; ++i) {
      try {
        threads_.emplace_back([this] { run(); });
      } catch (const std::system_error& error) {
        return Status::from_errno(error.code().value(), "thread to populate the host arena", Code::kResourceExhausted);
      }
    }
    return {};
  }

  std::byte* base() noexcept override { return base_; }
  std::uint64_t bytes() const noexcept override { return bytes_; }
  int memfd() const noexcept override { return fd_.get(); }

  ArenaStats stats() const noexcept override {
    ArenaStats stats;
    stats.bytes = bytes_;
    {
      const std::lock_guard lock(mutex_);
      stats.populate_done = running_ == 0;
    }
    stats.populated_bytes = populated_.load(std::memory_order_relaxed);
    stats.huge_bytes = huge_.load(std::memory_order_relaxed);
    return stats;
  }

  void wait_populated() noexcept override {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void run() noexcept {
    ::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), kNice);
    while (!stop_.load(std::memory_order_relaxed)) {
      const std::uint64_t begin = next_.fetch_add(kStepBytes, std::memory_order_relaxed);
      if (begin >= bytes_) break;
      LMCN_SEQ_POINT("memory.arena.step");
      if (!populate(base_ + begin, std::min(kStepBytes, bytes_ - begin))) break;
    }
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) ended_.notify_all();
  }

  // false: the kernel has no memory left for us; the rest is populated by its first touch, or not at all.
  bool populate(std::byte* at, std::uint64_t bytes) noexcept {
    if (!collapse_.load(std::memory_order_relaxed) || !collapse(at, bytes)) {
      if (!populate_write(at, bytes)) return false;
      if (hugetlb_) huge_.fetch_add(bytes, std::memory_order_relaxed);
    }
    populated_.fetch_add(bytes, std::memory_order_relaxed);
    return true;
  }

  // Collapsing fills holes with zeros itself, so one small page for each huge one is enough to start from (a tenth of the time
  // of populating all of them first). Whatever users wrote stays. false: not all of the step became huge.
  bool collapse(std::byte* at, std::uint64_t bytes) noexcept {
    const std::uint64_t first_huge_page = static_cast<std::uint64_t>(at - base_) / kHugePageBytes;
    for (std::uint64_t i = 0; i < bytes; i += kHugePageBytes) {
      const std::uint64_t page = page_that_places_huge_page(first_huge_page + i / kHugePageBytes, nodes_);
      if (!populate_write(at + i + page * kSmallPageBytes, kSmallPageBytes)) return false;
    }
    if (retry_madvise(at, bytes, MADV_COLLAPSE)) {
      huge_.fetch_add(bytes, std::memory_order_relaxed);
      return true;
    }
    if (errno == EINVAL || errno == ENOSYS) {  // a kernel without it (before 6.1)
      collapse_.store(false, std::memory_order_relaxed);
      return false;
    }
    std::uint64_t huge = 0;
    for (std::uint64_t i = 0; i < bytes; i += kHugePageBytes) {
      if (retry_madvise(at + i, kHugePageBytes, MADV_COLLAPSE)) huge += kHugePageBytes;
    }
    huge_.fetch_add(huge, std::memory_order_relaxed);
    return huge == bytes;
  }

  bool populate_write(std::byte* at, std::uint64_t bytes) noexcept {
    if (retry_madvise(at, bytes, MADV_POPULATE_WRITE)) return true;
    if (errno != EINVAL) return false;
    // A kernel without it (before 5.14): a write that changes nothing, whatever a user writes at the same time.
    for (std::uint64_t i = 0; i < bytes; i += kSmallPageBytes) {
      std::atomic_ref(*reinterpret_cast<unsigned char*>(at + i)).fetch_or(0, std::memory_order_relaxed);
    }
    return true;
  }

  // EAGAIN: pages were busy just then (a user's write, I/O, another process's fault); a few tries find them at rest.
  bool retry_madvise(std::byte* at, std::uint64_t bytes, int advice) noexcept {
    constexpr int kTries = 4;
    for (int i = 0; i < kTries; ++i) {
      if (::madvise(at, bytes, advice) == 0) return true;
      if (errno != EAGAIN && errno != EINTR) return false;
    }
    return false;
  }

  const pid_t pid_ = ::getpid();
  const UniqueFd fd_;
  std::byte* const base_;
  const std::uint64_t bytes_;
  const bool hugetlb_;
  const std::uint64_t nodes_;  // how many different ones were asked for
  std::atomic<bool> collapse_;
  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> next_{0};  // first byte that no thread has taken
  std::atomic<std::uint64_t> populated_{0};
  std::atomic<std::uint64_t> huge_{0};
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  unsigned running_ = 0;  // guarded by mutex_
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<HostArena>> HostArena::create(const ArenaOptions& options) {
  const std::uint64_t bytes = options.bytes / kHugePageBytes * kHugePageBytes;
  if (bytes == 0)
    return Status(Code::kInvalidArgument, "host arena: bytes is " + std::to_string(options.bytes) + ", at least 2097152 needed");
  LMCN_RETURN_IF_ERROR(check_numa_nodes(options.numa_nodes));
  std::optional<Memory> memory;
  // Reserved hugetlb pages are not part of MemAvailable, so they are tried before that is checked.
  if ((options.huge_pages || options.require_hugetlb) && bytes < (1ull << 62)) {
    auto made = make_hugetlb(bytes);
    if (made.ok()) {
      memory = std::move(*made);
    } else if (options.require_hugetlb) {
      return hugetlb_refused(bytes, made.status());
    }
  }
  if (!memory) {
    LMCN_RETURN_IF_ERROR(check_available(bytes));
    auto made = make_memory(bytes, 0);
    if (!made.ok()) return made.status();
    memory = std::move(*made);
  }
  auto arena = std::make_unique<MemfdArena>(std::move(*memory), options, bytes);
  LMCN_RETURN_IF_ERROR(place_on_numa_nodes(arena->base(), bytes, options.numa_nodes));
  LMCN_RETURN_IF_ERROR(arena->start(options.populate_threads));
  return std::unique_ptr<HostArena>(std::move(arena));
}

}  // namespace lmcn
