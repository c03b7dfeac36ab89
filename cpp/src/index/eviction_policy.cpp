#include "index/eviction_policy.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <string>

#include "index/lru_policy.hpp"

namespace lmcn {
namespace {

std::string upper(std::string_view name) {
  std::string text(name);
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return text;
}

constexpr std::array<std::string_view, 5> kLater = {"LFU", "FIFO", "S3-FIFO", "S3FIFO", "MRU"};

}  // namespace

Result<std::unique_ptr<EvictionPolicy>> make_eviction_policy(std::string_view name) {
  const std::string wanted = upper(name);
  if (wanted == "LRU") return std::unique_ptr<EvictionPolicy>(std::make_unique<LruPolicy>());
  const bool later = std::find(kLater.begin(), kLater.end(), wanted) != kLater.end();
  return Status(Code::kInvalidArgument, "cache_policy is \"" + std::string(name) + "\", which " +
                                            (later ? "is not yet available" : "is not known") + "; available: \"LRU\"");
}

}  // namespace lmcn
