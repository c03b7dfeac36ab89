#include "store/admission.hpp"

#include <cstring>

namespace lmcn {
namespace {

constexpr std::size_t kSeenPlaces = 1 << 16;  // 512 KiB; a place remembers the last key refused there
constexpr std::uint64_t kDearAt = 3;          // of kDearOf: writes are dear when this part of the day's budget is spent
constexpr std::uint64_t kDearOf = 4;

}  // namespace

Result<AdmissionMode> parse_admission_mode(const std::string& name) {
  if (name == "auto") return AdmissionMode::kAuto;
  if (name == "always") return AdmissionMode::kAlways;
  if (name == "second_touch") return AdmissionMode::kSecondTouch;
  return Status(Code::kInvalidArgument, "admission=" + name + ": must be auto, always or second_touch");
}

Admitted Admission::decide(const ChunkKey& key, const Offer& offer) {
  if (offer.day_bytes + offer.bytes > budget_bytes_) return Admitted::kOverBudget;
  const bool dear = offer.device_behind || offer.day_bytes + offer.bytes > budget_bytes_ / kDearOf * kDearAt;
  const bool all = !offer.low && (mode_ == AdmissionMode::kAlways || (mode_ == AdmissionMode::kAuto && !dear));
  return all || offer.touched || seen_before(key) ? Admitted::kYes : Admitted::kFirstTouch;
}

// Keys are SHA-256: any of their bits are a hash.
bool Admission::seen_before(const ChunkKey& key) {
  std::uint64_t words[2];
  std::memcpy(words, &key, sizeof words);
  if (seen_.empty()) seen_.resize(kSeenPlaces);
  std::uint64_t& place = seen_[words[1] % kSeenPlaces];
  const std::uint64_t fingerprint = words[0] | 1;  // 0: free
  if (place == fingerprint) return true;
  place = fingerprint;
  return false;
}

}  // namespace lmcn
