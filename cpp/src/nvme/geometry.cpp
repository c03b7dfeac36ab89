#include "nvme/geometry.hpp"

#include <algorithm>

#include "memory/slot_image.hpp"
#include "nvme/format.hpp"
#include "nvme/striped_log.hpp"

namespace lmcn::nvme {
namespace {

constexpr std::uint64_t kMiB = 1ull << 20;
constexpr std::uint64_t kDefaultRegionBytes = 256 * kMiB;
constexpr std::uint64_t kMinDefaultRegionBytes = 16 * kMiB;
constexpr std::uint64_t kMinRegionBytes = 1 * kMiB;  // when given explicitly
constexpr std::uint64_t kMaxRegionBytes = 1ull << 43;
constexpr std::uint64_t kMinRegions = 4;  // open, sealing, clean, sealed
constexpr std::uint64_t kWantedRegions = 8;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Header, records, a footer page.
constexpr std::uint64_t region_for_records(std::uint64_t count, std::uint64_t record_bytes) {
  return count * record_bytes + 2 * kPageBytes;
}

std::uint64_t limit_for_regions(std::uint64_t regions, std::uint64_t region_bytes) {
  std::uint64_t limit = round_up(regions * region_bytes, kMiB);
  while (limit - reserved_bytes(limit) < regions * region_bytes) limit += kMiB;
  return limit;
}

std::string bytes_text(std::uint64_t bytes) {
  return std::to_string(bytes) + " bytes";
}

}  // namespace

std::uint64_t overhead_bytes(std::uint64_t limit_bytes) noexcept {
  return 128 * 1024 + limit_bytes / 2048;
}
std::uint64_t reserved_bytes(std::uint64_t limit_bytes) noexcept {
  return overhead_bytes(limit_bytes) + limit_bytes / 256;
}

Result<Geometry> choose_geometry(const LogOptions& options, std::uint64_t existing_region_bytes, std::uint64_t file_system_bytes,
                                 std::string* note) {
  const std::uint64_t record = round_up(options.max_record_bytes, kPageBytes);
  if (record < kMinRecordPages * kPageBytes || record > kMaxRegionBytes / 4) {
    return Status(Code::kInvalidArgument, "max_record_bytes is " + bytes_text(options.max_record_bytes) + ", must be from " +
                                              bytes_text(kMinRecordPages * kPageBytes) + " to " + bytes_text(kMaxRegionBytes / 4));
  }
  if (options.limit_bytes > file_system_bytes) {
    return Status(Code::kInvalidArgument, "limit of " + bytes_text(options.limit_bytes) + " is larger than the file system of " +
                                              options.directory + ", which has " + bytes_text(file_system_bytes));
  }
  const std::uint64_t two_records = round_up(region_for_records(2, record), kMiB);
  std::uint64_t region = options.region_bytes;
  if (existing_region_bytes != 0) {
    if (region != 0 && region != existing_region_bytes) {
      *note = "region_bytes " + std::to_string(region) + " not used: the store in " + options.directory +
              " was made with regions of " + bytes_text(existing_region_bytes);
    }
    region = existing_region_bytes;
    if (region < region_for_records(1, record)) {
      return Status(Code::kInvalidArgument, "the store in " + options.directory + " has regions of " + bytes_text(region) +
                                                ", records of up to " + bytes_text(record) + " need " + bytes_text(two_records) +
                                                ": remove the directory or name another");
    }
  } else if (region != 0) {
    const std::uint64_t minimum = std::max(kMinRegionBytes, round_up(region_for_records(2, record), kPageBytes));
    if (region < minimum || region > kMaxRegionBytes || region % kPageBytes != 0) {
      return Status(Code::kInvalidArgument, "region_bytes is " + bytes_text(region) + ", must be a multiple of 4096 from " +
                                                bytes_text(minimum) + " (two records of " + bytes_text(record) + ") to " +
                                                bytes_text(kMaxRegionBytes));
    }
  } else {
    const std::uint64_t smallest = std::max(kMinDefaultRegionBytes, two_records);
    const std::uint64_t usable = options.limit_bytes - std::min(options.limit_bytes, reserved_bytes(options.limit_bytes));
    region = std::max(smallest, std::min(kDefaultRegionBytes, usable / kWantedRegions / kMiB * kMiB));
  }
  const std::uint64_t minimum_limit = limit_for_regions(kMinRegions, region);
  if (options.limit_bytes < minimum_limit) {
    return Status(Code::kInvalidArgument, "limit of " + bytes_text(options.limit_bytes) + " for " + options.directory +
                                              " is too small: at least " + bytes_text(minimum_limit) + " (4 regions of " +
                                              bytes_text(region) + ", records of up to " + bytes_text(record) + ")");
  }
  Geometry geometry;
  geometry.region_bytes = region;
  geometry.region_pages = static_cast<std::uint32_t>(region / kPageBytes);
  geometry.max_regions = static_cast<std::uint32_t>(
      std::min<std::uint64_t>((options.limit_bytes - reserved_bytes(options.limit_bytes)) / region, kMaxRegionsPerPath));
  return geometry;
}

}  // namespace lmcn::nvme
