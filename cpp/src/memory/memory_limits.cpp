#include "memory/memory_limits.hpp"

#include <charconv>
#include <fstream>
#include <optional>
#include <string_view>

namespace lmcn {
namespace {

// nullopt: absent, or "max".
std::optional<std::uint64_t> parse_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end == text.data()) return std::nullopt;
  return value;
}

std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  if (!(file >> word)) return std::nullopt;
  return parse_number(word);
}

// "name value" or "name: value unit" lines.
std::optional<std::uint64_t> read_field(const std::string& path, std::string_view name) {
  std::ifstream file(path);
  std::string field;
  std::string value;
  std::string line;
  while (file >> field >> value && std::getline(file, line)) {
    if (field == name) return parse_number(value);
  }
  return std::nullopt;
}

struct CgroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* reclaimable;  // field of memory.stat
};
constexpr CgroupFiles kVersion2{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};
constexpr CgroupFiles kVersion1{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};

void lower_to(AvailableMemory& available, const std::string& root, const CgroupFiles& files, std::string group) {
  for (;;) {
    const std::string directory = root + files.mount + (group == "/" ? "" : group) + "/";
    const auto limit = read_number(directory + files.limit);
    const auto usage = read_number(directory + files.usage);
    if (limit && usage) {
      const std::uint64_t reclaimable = read_field(directory + "memory.stat", files.reclaimable).value_or(0);
      const std::uint64_t held = *usage > reclaimable ? *usage - reclaimable : 0;
      const std::uint64_t left = *limit > held ? *limit - held : 0;
      if (left < available.bytes) available = {left, directory + files.limit};
    }
    if (group.empty() || group == "/") return;
    group.resize(group.rfind('/'));
  }
}

bool lists(std::string_view comma_separated, std::string_view word) {
  while (!comma_separated.empty()) {
    const auto comma = comma_separated.find(',');
    if (comma_separated.substr(0, comma) == word) return true;
    if (comma == std::string_view::npos) return false;
    comma_separated.remove_prefix(comma + 1);
  }
  return false;
}

}  // namespace

AvailableMemory available_memory(const std::string& root) {
  const auto kib = read_field(root + "/proc/meminfo", "MemAvailable:");
  if (!kib) return {0, "/proc/meminfo"};
  AvailableMemory available{*kib * 1024, "MemAvailable"};

  std::ifstream groups(root + "/proc/self/cgroup");  // lines "id:controllers:/path"; version 2 is "0::/path"
  std::string line;
  while (std::getline(groups, line)) {
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos || second + 1 >= line.size() || line[second + 1] != '/') continue;
    const std::string_view controllers = std::string_view(line).substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) lower_to(available, root, kVersion2, group);
    if (lists(controllers, "memory")) lower_to(available, root, kVersion1, group);
  }
  return available;
}

HugePages huge_pages_of_2mib(const std::string& root) {
  const std::string pool = root + "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  HugePages pages;
  pages.total = read_number(pool + "nr_hugepages").value_or(0);
  const std::uint64_t free = read_number(pool + "free_hugepages").value_or(0);
  const std::uint64_t promised = read_number(pool + "resv_hugepages").value_or(0);
  pages.free = free > promised ? free - promised : 0;
  return pages;
}

}  // namespace lmcn
