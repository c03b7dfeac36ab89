#include "witness_engine.hpp"

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "nvme/format.hpp"

namespace lmcn::crash {

struct WitnessEngine::Flight final : io::CompletionSink {
  Flight(WitnessEngine& e, const io::IoRequest& r) : engine(e), original(r) {}
  void on_io(const io::IoResult& result) noexcept override {
    const std::unique_ptr<Flight> self(this);
    if (result.error == 0 && result.actual == result.expected) engine.note_written(original);
    if (engine.count_event()) ::kill(::getpid(), SIGKILL);
    original.sink->on_io(result);
  }
  WitnessEngine& engine;
  const io::IoRequest original;
};

void WitnessEngine::submit(std::span<const io::IoRequest> requests) {
  std::vector<io::IoRequest> forwarded;
  forwarded.reserve(requests.size());
  for (const io::IoRequest& request : requests) {
    note_header(request);
    forwarded.push_back(request);
    forwarded.back().sink = new Flight(*this, request);
    if (count_event()) die_during(request);
  }
  inner_->submit(forwarded);
}

bool WitnessEngine::count_event() {
  return ledger_.events.fetch_add(1) + 1 == ledger_.kill_at;
}

// A process can die when a part of its write is done.
void WitnessEngine::die_during(const io::IoRequest& request) {
  if (request.op == io::Op::kWrite) {
    const std::uint64_t pages = ledger_.kill_at * 31 % (request.bytes / kPageBytes + 1);
    // Whether it succeeds does not matter: this is the last thing that happens.
    [[maybe_unused]] const ssize_t n = ::pwrite(request.fd, request.data, pages * kPageBytes, static_cast<off_t>(request.offset));
  }
  ::kill(::getpid(), SIGKILL);
}

void WitnessEngine::note_header(const io::IoRequest& request) {
  if (request.op != io::Op::kWrite || request.fd != data_fd_ || request.bytes != kPageBytes || request.offset % kRegionBytes != 0) {
    return;
  }
  nvme::RegionHeader header;
  std::memcpy(static_cast<void*>(&header), request.data, sizeof header);
  ledger_.region_sequence[request.offset / kRegionBytes % kMaxRegions] = header.sequence;
}

void WitnessEngine::note_written(const io::IoRequest& request) {
  if (request.op != io::Op::kWrite || request.fd != data_fd_) return;
  const std::uint64_t region = request.offset / kRegionBytes % kMaxRegions;
  if (const SlotHeader& header = *slot_header(request.data); header.magic == kSlotMagic) {
    ledger_.whole[region][request.offset % kRegionBytes / kPageBytes] = header.region_sequence;
    return;
  }
  nvme::FooterTrailer trailer;
  std::memcpy(&trailer, request.data + request.bytes - sizeof trailer, sizeof trailer);
  if (trailer.magic == nvme::kFooterMagic) ledger_.sealed_sequence[region] = trailer.sequence;
}

}  // namespace lmcn::crash
