#include "io/request_queue.hpp"

#include "io_support.hpp"

namespace lmcn::io {
namespace {

std::vector<std::uint64_t> start_all(RequestQueue& queue) {
  std::vector<std::uint64_t> order;
  for (IoRequest request; queue.start(request);) order.push_back(request.tag);
  return order;
}

IoRequest tagged(Op op, std::uint64_t tag) {
  return {.op = op, .tag = tag};
}

TEST(RequestQueueTest, ReadsFirstThenFirstCome) {
  RequestQueue queue(16);
  const IoRequest requests[] = {tagged(Op::kWrite, 1), tagged(Op::kRead, 2), tagged(Op::kSync, 3), tagged(Op::kRead, 4),
                                tagged(Op::kWrite, 5)};
  queue.push(requests);
  EXPECT_EQ(start_all(queue), (std::vector<std::uint64_t>{2, 4, 1, 3, 5}));
}

TEST(RequestQueueTest, BoundHoldsAndIsGivenBack) {
  RequestQueue queue(2);
  for (std::uint64_t tag = 1; tag <= 4; ++tag) {
    const IoRequest request = tagged(Op::kRead, tag);
    queue.push({&request, 1});
  }
  EXPECT_EQ(start_all(queue), (std::vector<std::uint64_t>{1, 2}));
  EXPECT_FALSE(queue.can_start());
  queue.finish();
  EXPECT_EQ(start_all(queue), (std::vector<std::uint64_t>{3}));
  EXPECT_EQ(queue.in_flight(), 2u);
  IoRequest left;
  EXPECT_TRUE(queue.cancel(left));  // whatever the bound
  EXPECT_EQ(left.tag, 4u);
  EXPECT_FALSE(queue.cancel(left));
}

}  // namespace
}  // namespace lmcn::io
