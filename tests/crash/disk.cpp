#include "disk.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <system_error>

#include "memory/unique_fd.hpp"
#include "nvme/directory.hpp"
#include "nvme/format.hpp"

namespace lmcn::crash {
namespace {

using Fd = UniqueFd;

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

std::vector<NamedRecord> named_records(const std::filesystem::path& directory) {
  std::vector<NamedRecord> named;
  const std::vector<std::uint64_t> sequences = region_sequences(directory);
  const Fd data = open_for_reading(directory / "data.000");
  const Fd superblock_file = open_for_reading(directory / "superblock");
  nvme::Superblock superblock;
  if (sequences.empty() || !read_page(superblock_file, 0, superblock)) return named;
  const std::uint64_t region_pages = superblock.region_bytes / kPageBytes;
  struct Page {
    std::byte bytes[kPageBytes];
  };
  for (std::uint32_t region = 0; region < sequences.size(); ++region) {
    // Footers of one page, which regions of the tests' size have.
    Page page;
    nvme::FooterTrailer trailer;
    if (!read_page(data, (region + 1) * superblock.region_bytes - kPageBytes, page)) continue;
    std::memcpy(&trailer, page.bytes + kPageBytes - sizeof trailer, sizeof trailer);
    if (trailer.magic != nvme::kFooterMagic || trailer.sequence != sequences[region] || sequences[region] == 0 ||
        trailer.footer_pages != 1 || nvme::footer_pages(trailer.record_count) != 1) {
      continue;
    }
    const auto* entries = reinterpret_cast<const nvme::FooterEntry*>(page.bytes);
    if (trailer.checksum != nvme::footer_checksum(entries, trailer.record_count, trailer)) continue;
    for (std::uint32_t i = 0; i < trailer.record_count; ++i) {
      named.push_back({entries[i].key, Extent{region, entries[i].page, entries[i].pages}, trailer.sequence});
    }
  }
  std::ifstream file(directory / "index.ckpt", std::ios::binary);
  const std::vector<char> text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  nvme::CheckpointHeader header;
  if (text.size() < sizeof header) return named;
  std::memcpy(static_cast<void*>(&header), text.data(), sizeof header);
  if (!nvme::page_holds(header, nvme::kCheckpointMagic) || header.epoch != superblock.epoch || header.uuid != superblock.uuid) {
    return named;
  }
  const char* const table = text.data() + sizeof header + header.entry_count * sizeof(nvme::CheckpointEntry);
  for (std::uint64_t i = 0; i < header.entry_count; ++i) {
    nvme::CheckpointEntry entry;
    std::memcpy(&entry, text.data() + sizeof header + i * sizeof entry, sizeof entry);
    nvme::CheckpointRegion state;
    std::memcpy(&state, table + entry.region * sizeof state, sizeof state);
    if (entry.region >= sequences.size() || sequences[entry.region] == 0 || state.sequence != sequences[entry.region] ||
        entry.page + entry.pages > std::min<std::uint64_t>(state.known_pages, region_pages)) {
      continue;
    }
    named.push_back({entry.key, Extent{entry.region, entry.page, entry.pages}, state.sequence});
  }
  return named;
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
