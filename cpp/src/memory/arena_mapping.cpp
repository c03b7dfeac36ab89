#include "memory/arena_mapping.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <string>

#include "memory/host_arena.hpp"
#include "memory/unique_fd.hpp"

namespace lmcn {

Result<std::byte*> map_shared_aligned(int memfd, std::uint64_t bytes) {
  // Reserve enough addresses to hold an aligned range, map over that, give the rest back.
  const std::uint64_t reserved = bytes + kHugePageBytes;
  void* const range = ::mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED)
    return Status::from_errno(errno, "mmap of " + std::to_string(reserved) + " bytes of addresses", Code::kResourceExhausted);
  auto* const first = static_cast<std::byte*>(range);
  const std::uint64_t lead = (kHugePageBytes - reinterpret_cast<std::uintptr_t>(first) % kHugePageBytes) % kHugePageBytes;
  std::byte* const base = first + lead;
  if (::mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memfd, 0) == MAP_FAILED) {
    const int error = errno;
    ::munmap(range, reserved);
    return Status::from_errno(error, "mmap of " + std::to_string(bytes) + " bytes of the arena", Code::kResourceExhausted);
  }
  if (lead > 0) ::munmap(first, lead);
  ::munmap(base + bytes, kHugePageBytes - lead);
  if (::madvise(base, bytes, MADV_DONTDUMP) != 0) {
    const int error = errno;
    ::munmap(base, bytes);
    return Status::from_errno(error, "madvise(MADV_DONTDUMP) of the arena");
  }
  return base;
}

Result<std::unique_ptr<MappedArena>> MappedArena::map(int memfd, std::uint64_t bytes) {
  const UniqueFd fd(memfd);
  struct stat status{};
  if (::fstat(memfd, &status) != 0) return Status::from_errno(errno, "fstat of the arena's descriptor " + std::to_string(memfd));
  if (bytes == 0 || bytes % kHugePageBytes != 0 || static_cast<std::uint64_t>(status.st_size) != bytes) {
    return Status(Code::kInvalidArgument, "arena: bytes is " + std::to_string(bytes) + ", the descriptor has " +
                                              std::to_string(status.st_size) + "; both must be the same multiple of 2 MiB");
  }
  // Without the seals the owner could truncate it under us: SIGBUS.
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW;
  const int seals = ::fcntl(memfd, F_GET_SEALS);
  if (seals < 0 || (seals & kNeeded) != kNeeded) {
    return Status(Code::kInvalidArgument, "arena: the descriptor is not a memfd sealed against shrinking and growing");
  }
  auto base = map_shared_aligned(memfd, bytes);
  if (!base.ok()) return base.status();
  return std::unique_ptr<MappedArena>(new MappedArena(*base, bytes));
}

MappedArena::~MappedArena() {
  ::munmap(base_, bytes_);
}

}  // namespace lmcn
