#include "nvme/format.hpp"

#include <xxhash.h>

#include <algorithm>
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

PageBuffer::PageBuffer(std::uint64_t pages)
    : bytes_(pages * kPageBytes), memory_(static_cast<std::byte*>(::operator new[](bytes_, std::align_val_t{kPageBytes}))) {
  std::memset(memory_.get(), 0, bytes_);
}

PageBuffer make_footer(std::span<const FooterEntry> entries, const Uuid& uuid, std::uint64_t region_sequence,
                       std::uint64_t last_record_sequence) {
  PageBuffer footer(footer_pages(entries.size()));
  auto* first = reinterpret_cast<FooterEntry*>(footer.data());
  std::copy(entries.begin(), entries.end(), first);
  auto* trailer = reinterpret_cast<FooterTrailer*>(footer.data() + footer.bytes() - sizeof(FooterTrailer));
  trailer->magic = kFooterMagic;
  trailer->format = kFormatVersion;
  trailer->footer_pages = footer_pages(entries.size());
  trailer->uuid = uuid;
  trailer->sequence = region_sequence;
  trailer->last_record_sequence = last_record_sequence;
  trailer->record_count = static_cast<std::uint32_t>(entries.size());
  trailer->checksum = footer_checksum(first, entries.size(), *trailer);
  return footer;
}

}  // namespace lmcn::nvme
