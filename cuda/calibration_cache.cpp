#include "calibration_cache.hpp"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "cuda_error.hpp"
#include "memory/checksum.hpp"
#include "memory/unique_fd.hpp"

namespace lmcn {
namespace {

// Raise it when a path becomes faster or slower than it was.
constexpr int kVersion = 1;
constexpr std::size_t kMostFileBytes = 64 << 10;

std::uint64_t digest(const std::string& text) {
  return checksum64(reinterpret_cast<const std::byte*>(text.data()), text.size());
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::string content_of(const CalibrationKey& key, const Calibration& calibration) {
  std::string text = key.text;
  for (const PathRate& rate : calibration.rates) {
    char line[96];
    std::snprintf(line, sizeof line, "gb_s %s %.6g %.6g\n", path_name(rate.path), rate.gather_gb_s, rate.scatter_gb_s);
    text += line;
  }
  return text + "checksum " + hex(digest(text)) + "\n";
}

std::optional<std::string> read_file(const std::string& path) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  struct stat status{};
  if (!file.valid() || ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_uid != ::geteuid()) return {};
  std::string text(kMostFileBytes, '\0');
  std::size_t have = 0;
  while (have < text.size()) {
    const ssize_t got = ::read(file.get(), text.data() + have, text.size() - have);
    if (got < 0) return {};
    if (got == 0) break;
    have += static_cast<std::size_t>(got);
  }
  text.resize(have);
  return text;
}

}  // namespace

std::string layout_text(const CopyGeometry& geometry, std::int64_t chunk_tokens) {
  const PageCounts& counts = geometry.counts();
  std::ostringstream layout;
  layout << counts.block_tokens << ' ' << counts.heads << ' ' << counts.head_dim << ' ' << counts.element_bytes << ' '
         << chunk_tokens;
  for (const PlaneGeometry& plane : geometry.planes()) {
    // Not the addresses; but what alignment they have.
    layout << ' ' << plane.block << ' ' << plane.token << ' ' << plane.head << ' ' << plane.dim << ' ' << plane.slot << ' '
           << plane.interleaved << ' ' << reinterpret_cast<std::uintptr_t>(plane.base) % 512;
  }
  return layout.str();
}

Result<CalibrationKey> CalibrationKey::of(const CopyGeometry& geometry, std::int64_t chunk_tokens, int device) {
  cudaDeviceProp properties{};
  if (Status status = cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", Code::kUnavailable);
      !status.ok()) {
    return status;
  }
  int driver = 0;
  if (Status status = cuda_check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion", Code::kUnavailable); !status.ok()) {
    return status;
  }
  std::string device_name = properties.name;
  for (char& c : device_name) {
    if (c == '\n') c = ' ';
  }
  CalibrationKey key;
  key.text = "lmcache-native-calibration " + std::to_string(kVersion) + "\ndevice " + device_name + "\ndriver " +
             std::to_string(driver) + "\nruntime " + std::to_string(CUDART_VERSION) + "\nlayout " +
             hex(digest(layout_text(geometry, chunk_tokens))) + "\n";
  return key;
}

Result<CalibrationCache> CalibrationCache::open() {
  const char* const xdg = std::getenv("XDG_CACHE_HOME");
  const char* const home = std::getenv("HOME");
  std::string folder;
  if (xdg != nullptr && xdg[0] == '/') {
    folder = xdg;
  } else if (home != nullptr && home[0] == '/') {
    folder = std::string(home) + "/.cache";
  } else {
    return Status(Code::kUnavailable, "neither XDG_CACHE_HOME nor HOME is an absolute path");
  }
  for (const char* const part : {"", "/lmcache-native", "/calibration"}) {
    folder += part;
    if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST)
      return Status::from_errno(errno, "mkdir " + folder, Code::kUnavailable);
  }
  struct stat status{};
  if (::lstat(folder.c_str(), &status) != 0) return Status::from_errno(errno, "lstat " + folder, Code::kUnavailable);
  if (!S_ISDIR(status.st_mode) || status.st_uid != ::geteuid() || (status.st_mode & 022) != 0) {
    return Status(Code::kUnavailable, folder + " is not a folder that belongs to this user and that only this user may write");
  }
  return CalibrationCache(folder);
}

std::string CalibrationCache::path_of(const CalibrationKey& key) const {
  return folder_ + "/" + hex(digest(key.text));
}

std::optional<Calibration> CalibrationCache::load(const CalibrationKey& key) const {
  const std::optional<std::string> text = read_file(path_of(key));
  if (!text || !text->starts_with(key.text)) return {};
  Calibration calibration;
  std::istringstream lines(text->substr(key.text.size()));
  for (std::string line; std::getline(lines, line) && line.starts_with("gb_s ");) {
    std::istringstream words(line.substr(5));
    std::string name;
    PathRate rate;
    words >> name >> rate.gather_gb_s >> rate.scatter_gb_s;
    const std::optional<PathKind> path = lmcn::path_of(name);
    if (!words || !path || !(rate.gather_gb_s > 0) || !(rate.scatter_gb_s > 0)) return {};
    rate.path = *path;
    calibration.rates.push_back(rate);
  }
  // Also what is right but written in another way is not ours.
  if (calibration.rates.empty() || content_of(key, calibration) != *text) return {};
  return calibration;
}

Status CalibrationCache::store(const CalibrationKey& key, const Calibration& calibration) const {
  const std::string text = content_of(key, calibration), path = path_of(key);
  std::string temporary = path + ".XXXXXX";
  UniqueFd file(::mkostemp(temporary.data(), O_CLOEXEC));  // mode 0600
  if (!file.valid()) return Status::from_errno(errno, "mkostemp " + temporary);
  const ssize_t written = ::write(file.get(), text.data(), text.size());
  int error = written < 0 ? errno : written != static_cast<ssize_t>(text.size()) ? ENOSPC : 0;
  if (error == 0 && ::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error == 0) return {};
  static_cast<void>(::unlink(temporary.c_str()));
  return Status::from_errno(error, "writing " + path);
}

}  // namespace lmcn
