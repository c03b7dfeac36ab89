// index.ckpt: what the caller's index says is on NVMe, so that open() need not read all footers.
#include "nvme/checkpoint.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "nvme/geometry.hpp"
#include "nvme/log.hpp"
#include "nvme/striped_log.hpp"

namespace lmcn::nvme {

CheckpointWriter::CheckpointWriter(FileReplacement& file, std::function<Status(std::uint64_t)> admit)
    : file_(file), admit_(std::move(admit)) {
  buffer_.reserve(kChunkBytes);
}

void CheckpointWriter::flush() {
  if (status_.ok()) status_ = admit_(offset_ + buffer_.size());
  if (status_.ok()) {
    checksum_.update(buffer_.data(), buffer_.size());
    status_ = file_.write_at(offset_, buffer_);
    offset_ += buffer_.size();
  }
  buffer_.clear();
}

Status CheckpointWriter::commit(CheckpointHeader& header) {
  flush();
  LMCN_RETURN_IF_ERROR(status_);
  header.magic = kCheckpointMagic;
  header.body_checksum = checksum_.digest();
  seal_page(header);
  LMCN_RETURN_IF_ERROR(file_.write_at(0, std::as_bytes(std::span(&header, 1))));
  return file_.commit();
}

std::uint64_t Log::checkpoint_allowance() const {
  return options_.limit_bytes - overhead_bytes(options_.limit_bytes) - geometry_.max_regions * geometry_.region_bytes;
}

Status Log::checkpoint(const EntrySource& entries) {
  LMCN_RETURN_IF_ERROR(usable());
  std::vector<CheckpointRegion> table(region_count_);
  std::vector<std::uint32_t> end_pages(region_count_);
  std::uint64_t old_bytes = 0;
  {
    std::lock_guard lock(mutex_);
    old_bytes = checkpoint_bytes_;
    for (std::uint32_t i = 0; i < region_count_; ++i) {
      const Region& r = regions_[i];
      if (r.state < RegionState::kOpen) continue;
      table[i].sequence = words_[i].sequence;
      table[i].known_pages = r.settled_pages;
      table[i].sealed = r.state == RegionState::kSealed ? 1 : 0;
      end_pages[i] = r.next_page;
    }
  }
  // I4: no entry for a record that a power loss could take.
  LMCN_RETURN_IF_ERROR(sync_now());

  Result<FileReplacement> file = FileReplacement::create(*directory_, engine_, "index.ckpt", &in_flight_);
  if (!file.ok()) return lose_checkpoint(file.status());
  const std::uint64_t allowance = checkpoint_allowance();
  CheckpointWriter body(*file, [&](std::uint64_t bytes) -> Status {
    if (bytes + old_bytes > allowance && old_bytes != 0) {
      LMCN_RETURN_IF_ERROR(directory_->remove("index.ckpt"));
      std::lock_guard lock(mutex_);
      old_bytes = checkpoint_bytes_ = 0;
    }
    if (bytes + old_bytes <= allowance) return {};
    return {Code::kResourceExhausted, "checkpoint of " + directory_->path() + " would take more than " + std::to_string(allowance) +
                                          " bytes, which is what limit_bytes leaves for it"};
  });
  CheckpointHeader header{};
  header.uuid = uuid_;
  header.epoch = superblock_.epoch;
  header.next_region_sequence = next_region_sequence_;
  header.next_record_sequence = next_record_sequence_;
  header.region_count = region_count_;
  header.totals = lifetime();
  header.limit_bytes = options_.limit_bytes;
  header.hours = written_.saved(static_cast<std::int64_t>(unix_seconds_now()));
  entries({[&](const ChunkKey& key, Extent extent, std::uint16_t hits) {
    if (extent.region >= region_count_ || table[extent.region].sequence == 0) return;
    body.add(CheckpointEntry{key, extent.region, extent.page, extent.pages, hits, 0});
    ++header.entry_count;
    // WriteDones run in a region's order: the snapshot that has this record has, or has forgotten, all before it.
    CheckpointRegion& region = table[extent.region];
    region.known_pages = std::max(region.known_pages, extent.page + extent.pages);
  }});
  for (std::uint32_t i = 0; i < region_count_; ++i) {
    if (table[i].sealed != 0 && table[i].known_pages != end_pages[i]) table[i].sealed = 0;
    body.add(table[i]);
  }
  Status status = body.commit(header);
  if (!status.ok()) return lose_checkpoint(std::move(status));
  written_.add(body.file_bytes());
  std::lock_guard lock(mutex_);
  checkpoint_bytes_ = body.file_bytes();
  return {};
}

// Regions have their space: neither a full file system nor a directory that was deleted ends writing.
Status Log::lose_checkpoint(Status why) {
  if (why.code() != Code::kResourceExhausted) counters_.write_errors.fetch_add(1, std::memory_order_relaxed);
  if (why.sys_errno() == EIO || why.sys_errno() == EROFS) quarantine(why);
  return why;
}

CheckpointFile load_checkpoint(const Directory& directory, io::IoEngine& engine, const Superblock& superblock) {
  CheckpointFile out;
  const Result<Fd> fd = directory.open_file("index.ckpt", O_RDONLY);
  if (!fd.ok()) {
    if (fd.status().code() != Code::kNotFound) out.why_not = fd.status().message();
    return out;
  }
  const auto unusable = [&out](std::string why) {
    out.why_not = std::move(why);
    return std::move(out);
  };
  const auto read = [&](void* data, std::uint64_t bytes, std::uint64_t offset) {
    io::IoRequest request;
    request.fd = fd->get();
    request.data = static_cast<std::byte*>(data);
    request.bytes = bytes;
    request.offset = offset;
    return io::run_sync(engine, request).status("read " + directory.path_of("index.ckpt"));
  };
  struct stat file{};
  if (::fstat(fd->get(), &file) != 0) return unusable(Status::from_errno(errno, "fstat").message());
  out.bytes = static_cast<std::uint64_t>(file.st_size);

  if (out.bytes < sizeof(CheckpointHeader)) return unusable("its length does not hold");

  LoadedCheckpoint loaded;
  CheckpointHeader& header = loaded.header;
  if (const Status status = read(&header, sizeof header, 0); !status.ok()) return unusable(status.message());
  if (!page_holds(header, kCheckpointMagic)) return unusable("its header does not hold");
  if (header.uuid != superblock.uuid) return unusable("it is of another store");
  out.known = true;
  out.totals = header.totals;
  out.limit_bytes = header.limit_bytes;
  out.hours = header.hours;
  if (header.epoch != superblock.epoch) return unusable("it is older than the last clear");
  const std::uint64_t body_bytes = out.bytes - sizeof header;
  const std::uint64_t table_bytes = header.region_count * sizeof(CheckpointRegion);
  if (table_bytes > body_bytes || header.entry_count != (body_bytes - table_bytes) / sizeof(CheckpointEntry) ||
      (body_bytes - table_bytes) % sizeof(CheckpointEntry) != 0) {
    return unusable("its length does not hold");
  }
  // Not by the length alone: a file with holes can have any.
  const std::uint64_t most_entries = header.region_count * (superblock.region_bytes / kPageBytes / kMinRecordPages);
  if (header.region_count > kMaxRegionsPerPath || header.entry_count > most_entries) {
    return unusable("it lists more regions or records than there can be");
  }
  try {
    loaded.regions.resize(header.region_count);
    loaded.entries.resize(header.entry_count);
  } catch (const std::bad_alloc&) {
    return unusable("there is no memory for its " + std::to_string(out.bytes) + " bytes");
  }
  const std::uint64_t entry_bytes = body_bytes - table_bytes;
  if (const Status status = read(loaded.regions.data(), table_bytes, sizeof header + entry_bytes); !status.ok())
    return unusable(status.message());
  auto* entries = reinterpret_cast<std::byte*>(loaded.entries.data());
  for (std::uint64_t at = 0; at < entry_bytes; at += CheckpointWriter::kChunkBytes) {
    const std::uint64_t piece = std::min<std::uint64_t>(CheckpointWriter::kChunkBytes, entry_bytes - at);
    if (const Status status = read(entries + at, piece, sizeof header + at); !status.ok()) return unusable(status.message());
  }
  StreamChecksum checksum;
  checksum.update(entries, entry_bytes);
  checksum.update(loaded.regions.data(), table_bytes);
  if (checksum.digest() != header.body_checksum) return unusable("its checksum does not hold");
  std::sort(loaded.entries.begin(), loaded.entries.end(), [](const CheckpointEntry& a, const CheckpointEntry& b) {
    return a.region != b.region ? a.region < b.region : a.page < b.page;
  });
  out.loaded = std::move(loaded);
  return out;
}

}  // namespace lmcn::nvme
