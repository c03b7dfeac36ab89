#include "disk.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "nvme/directory.hpp"
#include "nvme/format.hpp"

namespace lmcn::crash {
namespace {

using nvme::Fd;

// False: the file ends before.
template <class Page>
bool read_page(const Fd& fd, std::uint64_t offset, Page& page) {
  // O_DIRECT, so that what the last process wrote past the page cache is seen; nvme::PageBuffer is aligned for it.
  nvme::PageBuffer buffer(1);
  const ssize_t n = ::pread(fd.get(), buffer.data(), kPageBytes, static_cast<off_t>(offset));
  if (n < 0) throw std::system_error(errno, std::generic_category(), "pread");
  if (static_cast<std::uint64_t>(n) != kPageBytes) return false;
  std::memcpy(static_cast<void*>(&page), buffer.data(), sizeof page);
  return true;
}

Fd open_for_reading(const std::filesystem::path& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  return fd.valid() || errno != EINVAL ? std::move(fd) : Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
}

}  // namespace

std::vector<std::uint64_t> region_sequences(const std::filesystem::path& directory) {
  std::vector<std::uint64_t> sequences;
  const Fd superblock_file = open_for_reading(directory / "superblock");
  const Fd data = open_for_reading(directory / "data.000");
  nvme::Superblock superblock;
  if (!superblock_file.valid() || !data.valid() || !read_page(superblock_file, 0, superblock)) return sequences;
  if (!nvme::page_holds(superblock, nvme::kSuperblockMagic)) return sequences;
  nvme::RegionHeader header;
  for (std::uint32_t region = 0; read_page(data, region * superblock.region_bytes, header); ++region) {
    const bool ours = nvme::page_holds(header, nvme::kRegionMagic) && header.uuid == superblock.uuid && header.region == region &&
                      header.epoch == superblock.epoch;
    sequences.push_back(ours ? header.sequence : 0);
  }
  return sequences;
}

std::uint64_t allocated_bytes(const std::filesystem::path& directory) {
  std::uint64_t total = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    struct stat found{};
    if (::stat(entry.path().c_str(), &found) != 0) throw std::system_error(errno, std::generic_category(), entry.path());
    total += static_cast<std::uint64_t>(found.st_blocks) * 512;
  }
  return total;
}

}  // namespace lmcn::crash
