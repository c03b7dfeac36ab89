#include "nvme/format.hpp"

#include <xxhash.h>

#include <chrono>
#include <cstring>

namespace lmcn::nvme {

struct StreamChecksum::State {
  XXH3_state_t xxh;
};

StreamChecksum::StreamChecksum() : state_(std::make_unique<State>()) {
  XXH3_64bits_reset(&state_->xxh);
}
StreamChecksum::~StreamChecksum() = default;
void StreamChecksum::update(const void* data, std::size_t bytes) noexcept {
  XXH3_64bits_update(&state_->xxh, data, bytes);
}
std::uint64_t StreamChecksum::digest() const noexcept {
  return XXH3_64bits_digest(&state_->xxh);
}

std::uint64_t unix_seconds_now() noexcept {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count());
}

std::uint64_t checksum_bytes(const void* data, std::size_t bytes) noexcept {
  return XXH3_64bits(data, bytes);
}

std::uint64_t footer_checksum(const FooterEntry* entries, std::size_t count, const FooterTrailer& trailer) noexcept {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, entries, count * sizeof(FooterEntry));
  XXH3_64bits_update(&state, &trailer, offsetof(FooterTrailer, checksum));
  return XXH3_64bits_digest(&state);
}

PageBuffer make_footer(std::span<const FooterEntry> entries, const Uuid& uuid, std::uint64_t region_sequence,
                       std::uint64_t last_record_sequence) {
  const std::uint32_t pages = footer_pages(entries.size());
  PageBuffer buffer(pages);
  if (!entries.empty()) std::memcpy(buffer.data(), entries.data(), entries.size_bytes());
  auto* trailer = reinterpret_cast<FooterTrailer*>(buffer.data() + buffer.bytes() - sizeof(FooterTrailer));
  trailer->magic = kFooterMagic;
  trailer->format = kFormatVersion;
  trailer->footer_pages = pages;
  trailer->uuid = uuid;
  trailer->sequence = region_sequence;
  trailer->last_record_sequence = last_record_sequence;
  trailer->record_count = static_cast<std::uint32_t>(entries.size());
  trailer->checksum = footer_checksum(entries.data(), entries.size(), *trailer);
  return buffer;
}

PageBuffer::PageBuffer(std::uint64_t pages)
    : bytes_(pages * kPageBytes), memory_(static_cast<std::byte*>(::operator new[](bytes_, std::align_val_t{kPageBytes}))) {
  std::memset(memory_.get(), 0, bytes_);
}

}  // namespace lmcn::nvme
