#include "measure.hpp"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace lmcn::soak {
namespace {

std::uint64_t median(const std::vector<Sample>& samples, std::size_t begin, std::size_t end, std::uint64_t Sample::* field) {
  std::vector<std::uint64_t> values;
  for (std::size_t i = begin; i < end; ++i) values.push_back(samples[i].*field);
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

Sample medians(const std::vector<Sample>& samples, std::size_t begin, std::size_t end) {
  return {median(samples, begin, end, &Sample::resident_bytes), median(samples, begin, end, &Sample::descriptors),
          median(samples, begin, end, &Sample::nvme_allocated_bytes)};
}

}  // namespace

Sample sample_process() {
  Sample sample;
  std::ifstream statm("/proc/self/statm");
  std::uint64_t total_pages = 0, resident_pages = 0;
  if (!(statm >> total_pages >> resident_pages)) throw std::runtime_error("/proc/self/statm cannot be read");
  sample.resident_bytes = resident_pages * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++sample.descriptors;
  return sample;
}

Growth growth_of(const std::vector<Sample>& samples) {
  const std::size_t quarter = samples.size() / 4;
  return {medians(samples, quarter, 2 * quarter), medians(samples, samples.size() - quarter, samples.size())};
}

std::string Growth::complaint(bool judge_memory) const {
  const auto grew = [](const char* what, std::uint64_t before, std::uint64_t after, std::uint64_t bound) {
    return std::string(what) + " grew from " + std::to_string(before) + " (median of the second quarter) to " +
           std::to_string(after) + " (last quarter); at most " + std::to_string(bound) + " more is allowed";
  };
  if (judge_memory && last_quarter.resident_bytes > second_quarter.resident_bytes + kMemoryBytes) {
    return grew("resident bytes", second_quarter.resident_bytes, last_quarter.resident_bytes, kMemoryBytes);
  }
  if (last_quarter.descriptors > second_quarter.descriptors + kDescriptors) {
    return grew("open descriptors", second_quarter.descriptors, last_quarter.descriptors, kDescriptors);
  }
  return {};
}

}  // namespace lmcn::soak
