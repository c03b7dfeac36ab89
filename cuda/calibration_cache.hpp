// What calibrations found, in the user's cache folder: $XDG_CACHE_HOME or ~/.cache, then lmcache-native/calibration/<digest>.
#pragma once

#include <optional>
#include <string>

#include "calibration.hpp"
#include "copy/copy_geometry.hpp"

namespace lmcn {

/// How blocks lie in memory, but where: all of the layout that a rate may depend on.
std::string layout_text(const CopyGeometry& geometry, std::int64_t chunk_tokens);

/// All that a result depends on, one "name value" a line: versions, the device's name, how blocks lie in memory.
struct CalibrationKey {
  std::string text;
  /// kUnavailable: the device does not say what it is.
  static Result<CalibrationKey> of(const CopyGeometry& geometry, std::int64_t chunk_tokens, int device);
};

class CalibrationCache {
 public:
  /// kUnavailable: no cache folder, or one that others may write.
  static Result<CalibrationCache> open();
  /// nullopt: absent, of another key, or not exactly what store() writes.
  std::optional<Calibration> load(const CalibrationKey& key) const;
  /// Readers see the old file or the new one. kIoError.
  Status store(const CalibrationKey& key, const Calibration& calibration) const;
  std::string path_of(const CalibrationKey& key) const;

 private:
  explicit CalibrationCache(std::string folder) : folder_(std::move(folder)) {}
  std::string folder_;
};

}  // namespace lmcn
