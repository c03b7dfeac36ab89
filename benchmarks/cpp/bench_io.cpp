// What the engines make of a device, against plain pread/pwrite on the same file in the same minute: rounds are interleaved,
// medians are printed with the range. Figures of different runs on a shared device are not comparable.
//   bench_io [DIR=/tmp] [FILE_MIB=512] [REQUEST_KIB=2048] [ROUNDS=7]
//   bench_io depths [DIR=/tmp] [FILE_MIB=256] [ROUNDS=5] [REQUEST_KIB=128,1024,4096 one after another]
// The second one sets the thread pool beside io_uring at equal depth (threads = depth), for sizes that records have; the target is
// 90 % of io_uring's throughput; as many threads with pread and pwrite and no engine show what can be had. The pool as the store
// makes it (4 threads) is measured at depth 32 too.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "io/io_engine.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using namespace lmcn::io;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "bench_io: %s\n", what.c_str());
  std::exit(1);
}

double processor_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto of = [](const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6; };
  return of(usage.ru_utime) + of(usage.ru_stime);
}

struct Load {
  int fd;
  std::byte* memory;
  std::uint64_t request_bytes;
  std::vector<std::uint64_t> order;  // request numbers, shuffled; each has its place in file and memory
  IoRequest request(Op op, std::size_t i) const {
    const std::uint64_t at = order[i] * request_bytes;
    return {op, fd, memory + at, request_bytes, at, i, nullptr};
  }
  double bytes() const { return static_cast<double>(order.size() * request_bytes); }
};

class Countdown final : public CompletionSink {
 public:
  explicit Countdown(std::size_t count) : left_(count) {}
  void on_io(const IoResult& result) noexcept override {
    const lmcn::Status status = result.status("request");
    const std::lock_guard lock(mutex_);
    if (!status.ok()) failure_ = status.to_string();
    if (--left_ == 0) end_.notify_one();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    end_.wait(lock, [this] { return left_ == 0; });
    require(failure_.empty(), failure_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable end_;
  std::size_t left_;
  std::string failure_;
};

void run_plain(const Load& load, Op op, unsigned threads) {
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (std::size_t i = t; i < load.order.size(); i += threads) {
        const IoRequest r = load.request(op, i);
        const auto offset = static_cast<off_t>(r.offset);
        const ssize_t moved = op == Op::kRead ? ::pread(r.fd, r.data, r.bytes, offset) : ::pwrite(r.fd, r.data, r.bytes, offset);
        require(moved == static_cast<ssize_t>(r.bytes), "plain I/O was short");
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

void run_engine(const Load& load, Op op, IoEngine& engine, std::vector<double>& submit_us) {
  Countdown sink(load.order.size());
  for (std::size_t i = 0; i < load.order.size(); ++i) {
    IoRequest request = load.request(op, i);
    request.sink = &sink;
    const auto start = Clock::now();
    engine.submit({&request, 1});
    submit_us.push_back(seconds_since(start) * 1e6);
  }
  sink.wait();
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<std::size_t>(q * static_cast<double>(values.size() - 1))];
}

std::unique_ptr<IoEngine> engine_of(EngineKind kind) {
  std::string why;
  auto made = make_engine({.kind = kind}, &why);
  std::printf("%s\n", made.ok() ? why.c_str() : made.status().to_string().c_str());
  return made.ok() ? std::move(made.value()) : nullptr;
}

struct File {
  int fd;
  std::byte* memory;
};

File make_file(const std::string& directory, std::uint64_t bytes) {
  std::string path = directory + "/bench_io_XXXXXX";
  const int fd = ::mkostemp(path.data(), O_DIRECT | O_CLOEXEC);
  require(fd >= 0, "cannot make an O_DIRECT file in " + directory);
  ::unlink(path.c_str());
  void* area = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  require(area != MAP_FAILED, "no memory");
  return {fd, static_cast<std::byte*>(area)};
}

Load make_load(const File& file, std::uint64_t file_bytes, std::uint64_t request_bytes) {
  Load load{file.fd, file.memory, request_bytes, std::vector<std::uint64_t>(file_bytes / request_bytes)};
  std::iota(load.order.begin(), load.order.end(), std::uint64_t{0});
  return load;
}

struct Way {
  std::string name;
  std::unique_ptr<IoEngine> engine;
  std::vector<double> gigabytes_per_s, cpu_s_per_gib;
};

Way make_way(const std::string& name, const EngineOptions& options) {
  auto made = make_engine(options);
  require(made.ok(), made.status().message());
  return {name, std::move(made.value()), {}, {}};
}

void compare_at_depths(const std::string& directory, std::uint64_t file_bytes, unsigned rounds,
                       const std::vector<std::uint64_t>& request_sizes_kib) {
  const File file = make_file(directory, file_bytes);
  run_plain(make_load(file, file_bytes, std::min<std::uint64_t>(file_bytes, 4 << 20)), Op::kWrite, 1);
  std::mt19937_64 random(1);
  std::vector<double> ignored;
  int met = 0, all = 0;
  std::printf("%-5s %9s %5s   %-12s %22s %10s %12s\n", "", "request", "depth", "engine", "GB/s median (range)", "of uring",
              "CPU s/GiB");
  for (const Op op : {Op::kRead, Op::kWrite}) {
    for (const std::uint64_t request_kib : request_sizes_kib) {
      for (const unsigned depth : {1u, 8u, 32u}) {
        Load load = make_load(file, file_bytes, request_kib << 10);
        std::vector<Way> ways;
        ways.push_back(make_way("io_uring", {.kind = EngineKind::kIoUring, .queue_depth = depth}));
        ways.push_back(make_way("threads", {.kind = EngineKind::kThreads, .queue_depth = depth, .threads = depth}));
        ways.push_back({"plain", nullptr, {}, {}});
        if (depth == 32) ways.push_back(make_way("4 threads", {.kind = EngineKind::kThreads, .queue_depth = depth}));
        std::vector<Way*> order;
        for (Way& way : ways) order.push_back(&way);
        for (unsigned round = 0; round < rounds; ++round) {
          std::shuffle(load.order.begin(), load.order.end(), random);
          std::shuffle(order.begin(), order.end(), random);
          for (Way* way : order) {
            const double processor_start = processor_seconds();
            const auto start = Clock::now();
            if (way->engine) {
              run_engine(load, op, *way->engine, ignored);
            } else {
              run_plain(load, op, depth);
            }
            way->gigabytes_per_s.push_back(load.bytes() / seconds_since(start) * 1e-9);
            way->cpu_s_per_gib.push_back((processor_seconds() - processor_start) / load.bytes() * 0x1p30);
          }
        }
        const double uring = quantile(ways[0].gigabytes_per_s, 0.5);
        for (const Way& way : ways) {
          const double rate = quantile(way.gigabytes_per_s, 0.5);
          std::printf("%-5s %5llu KiB %5u   %-12s %8.2f (%5.2f-%5.2f) %8.0f %% %12.3f\n", op == Op::kRead ? "read" : "write",
                      static_cast<unsigned long long>(request_kib), depth, way.name.c_str(), rate, quantile(way.gigabytes_per_s, 0),
                      quantile(way.gigabytes_per_s, 1), 100 * rate / uring, quantile(way.cpu_s_per_gib, 0.5));
        }
        ++all;
        if (quantile(ways[1].gigabytes_per_s, 0.5) >= 0.9 * uring) ++met;
        std::fflush(stdout);
      }
    }
  }
  std::printf("the thread pool reaches 90 %% of io_uring at equal depth in %d of %d\n", met, all);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "depths") {
    const std::uint64_t bytes = std::strtoull(argc > 3 ? argv[3] : "256", nullptr, 10) << 20;
    const auto rounds = static_cast<unsigned>(std::strtoul(argc > 4 ? argv[4] : "5", nullptr, 10));
    require(bytes >= 4 << 20 && bytes % (4 << 20) == 0 && rounds > 0, "see the head of the source");
    const std::uint64_t kib = argc > 5 ? std::strtoull(argv[5], nullptr, 10) : 0;
    require(kib % 4 == 0 && kib << 10 <= bytes, "see the head of the source");
    compare_at_depths(argc > 2 ? argv[2] : "/tmp", bytes, rounds,
                      kib != 0 ? std::vector<std::uint64_t>{kib} : std::vector<std::uint64_t>{128, 1024, 4096});
    return 0;
  }
  const std::string directory = argc > 1 ? argv[1] : "/tmp";
  const std::uint64_t file_bytes = std::strtoull(argc > 2 ? argv[2] : "512", nullptr, 10) << 20;
  const std::uint64_t request_bytes = std::strtoull(argc > 3 ? argv[3] : "2048", nullptr, 10) << 10;
  const unsigned rounds = static_cast<unsigned>(std::strtoul(argc > 4 ? argv[4] : "7", nullptr, 10));
  require(request_bytes >= 4096 && request_bytes % 4096 == 0 && file_bytes >= request_bytes && rounds > 0,
          "see the head of the source");

  Load load = make_load(make_file(directory, file_bytes), file_bytes, request_bytes);
  run_plain(load, Op::kWrite, 1);  // blocks are allocated and written before anything is measured

  const auto uring = engine_of(EngineKind::kIoUring), fixed = engine_of(EngineKind::kIoUring),
             threads = engine_of(EngineKind::kThreads);
  if (fixed) {
    const auto start = Clock::now();
    const lmcn::Status status = fixed->register_buffer({load.memory, file_bytes});
    std::printf("register_buffer of %llu MiB: %.1f ms, %s\n", static_cast<unsigned long long>(file_bytes >> 20),
                seconds_since(start) * 1e3, status.to_string().c_str());
    require(fixed->register_fd(load.fd).ok(), "register_fd");
  }

  std::map<std::string, std::vector<double>> submit_us;
  std::vector<std::pair<std::string, std::function<void(Op)>>> ways = {
      {"plain x1", [&](Op op) { run_plain(load, op, 1); }},
      {"plain x4", [&](Op op) { run_plain(load, op, 4); }},
      {"threads", [&](Op op) { run_engine(load, op, *threads, submit_us["threads"]); }},
  };
  if (uring) ways.push_back({"io_uring", [&](Op op) { run_engine(load, op, *uring, submit_us["io_uring"]); }});
  if (fixed) ways.push_back({"io_uring fixed", [&](Op op) { run_engine(load, op, *fixed, submit_us["io_uring fixed"]); }});

  std::mt19937_64 random(1);
  for (const Op op : {Op::kRead, Op::kWrite}) {
    std::map<std::string, std::vector<double>> rate, processor;
    for (unsigned round = 0; round < rounds; ++round) {
      std::shuffle(load.order.begin(), load.order.end(), random);
      std::shuffle(ways.begin(), ways.end(), random);
      for (const auto& [name, way] : ways) {
        const double processor_start = processor_seconds();
        const auto start = Clock::now();
        way(op);
        rate[name].push_back(load.bytes() / seconds_since(start) * 1e-9);
        processor[name].push_back((processor_seconds() - processor_start) * 1e6 / static_cast<double>(load.order.size()));
      }
    }
    for (const auto& [name, values] : rate) {
      std::printf("%-5s %-15s GB/s median %5.2f (%5.2f - %5.2f)   CPU us/request %6.1f\n", op == Op::kRead ? "read" : "write",
                  name.c_str(), quantile(values, 0.5), quantile(values, 0), quantile(values, 1), quantile(processor[name], 0.5));
    }
  }
  for (const auto& [name, values] : submit_us) {
    std::printf("submit() %-15s us: median %.2f  p99 %.2f  most %.1f\n", name.c_str(), quantile(values, 0.5),
                quantile(values, 0.99), quantile(values, 1));
  }
  return 0;
}
