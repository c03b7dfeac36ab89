// Input: a byte of flags, then
//   0  the bytes of the file, as they are
//   1  the same, with both checksums made to fit
//   2  the same, and magic, version, uuid and epoch of this store; entry_count and region_count as the length has it
//   4  what a file is built from: its sequences, region states and entries in a short form
#include "store_under_test.hpp"

using namespace lmcn;
using namespace lmcn::fuzz;

namespace {

nvme::CheckpointHeader made_header(const MadeStore& store) {
  nvme::CheckpointHeader header;
  std::memcpy(static_cast<void*>(&header), store.files.checkpoint.data(), sizeof header);
  return header;
}

void put_header(Bytes& file, nvme::CheckpointHeader& header) {
  nvme::seal_page(header);
  std::memcpy(file.data(), &header, sizeof header);
  repair_checkpoint(file);
}

void make_identity_fit(const MadeStore& store, Bytes& file) {
  if (file.size() < kPageBytes) file.resize(kPageBytes);
  nvme::CheckpointHeader header;
  std::memcpy(static_cast<void*>(&header), file.data(), sizeof header);
  const nvme::CheckpointHeader made = made_header(store);
  header.magic = made.magic;
  header.uuid = made.uuid;
  header.epoch = made.epoch;
  const std::size_t body = file.size() - kPageBytes;
  header.region_count =
      static_cast<std::uint32_t>(std::min<std::size_t>(header.region_count, body / sizeof(nvme::CheckpointRegion)));
  header.entry_count = (body - header.region_count * sizeof(nvme::CheckpointRegion)) / sizeof(nvme::CheckpointEntry);
  file.resize(kPageBytes + header.region_count * sizeof(nvme::CheckpointRegion) +
              header.entry_count * sizeof(nvme::CheckpointEntry));
  put_header(file, header);
}

template <class T>
void add(Bytes& file, const T& item) {
  const auto* bytes = reinterpret_cast<const std::byte*>(&item);
  file.insert(file.end(), bytes, bytes + sizeof item);
}

Bytes built(const MadeStore& store, Input input) {
  Bytes file(kPageBytes);
  nvme::CheckpointHeader header = made_header(store);
  const auto sequences = input.take<std::uint8_t>();
  if ((sequences & 1) != 0) header.next_region_sequence = input.take<std::uint64_t>();
  if ((sequences & 2) != 0) header.next_record_sequence = input.take<std::uint64_t>();
  header.region_count = input.take<std::uint8_t>() % 16;
  std::vector<nvme::CheckpointRegion> regions(header.region_count);
  for (std::uint32_t i = 0; i < header.region_count; ++i) {
    const auto form = input.take<std::uint8_t>();
    const std::uint64_t made = i < store.region_sequences.size() ? store.region_sequences[i] : 0;
    regions[i].sequence = (form & 2) == 0 ? made : input.take<std::uint16_t>();
    regions[i].sealed = form & 1;
    regions[i].known_pages = (form & 4) == 0 ? input.take<std::uint8_t>() : input.take<std::uint32_t>();
  }
  header.entry_count = 0;
  while (!input.empty() && header.entry_count < 4096) {
    const auto form = input.take<std::uint8_t>();
    nvme::CheckpointEntry entry{};
    entry.key = key_of(input.take<std::uint8_t>());
    entry.region = form % 8;
    entry.page = (form & 16) == 0 ? input.take<std::uint8_t>() : input.take<std::uint32_t>();
    entry.pages = (form & 32) == 0 ? input.take<std::uint8_t>() : input.take<std::uint32_t>();
    if ((form & 64) != 0) entry.region = input.take<std::uint32_t>();
    add(file, entry);
    ++header.entry_count;
  }
  for (const nvme::CheckpointRegion& region : regions) add(file, region);
  put_header(file, header);
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const MadeStore& store = small_store();
  Input input({data, size});
  const auto flags = input.take<std::uint8_t>();
  StoreFiles files = store.files;
  if ((flags & 4) != 0) {
    files.checkpoint = built(store, input);
  } else {
    files.checkpoint = input.rest();
    if ((flags & 2) != 0) {
      make_identity_fit(store, files.checkpoint);
    } else if ((flags & 1) != 0) {
      repair_checkpoint(files.checkpoint);
    }
  }
  open_and_check(store, files, {.only_what_was_written = (flags & 7) == 0, .payloads_as_written = true});
  return 0;
}
