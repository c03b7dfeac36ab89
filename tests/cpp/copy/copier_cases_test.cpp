#include <gtest/gtest.h>

#include "copier_suite.hpp"

namespace lmcn::copier_suite {
namespace {

class CopierCases : public testing::TestWithParam<Order> {};

TEST_P(CopierCases, MoveEveryByteAndNoOther) {
  const std::unique_ptr<Backend> backend = make_backend();
  int ran = 0;
  for (const Case& c : all_cases()) {
    if (c.order != GetParam()) continue;
    EXPECT_EQ(run_case(*backend, c, 7), "") << c.name();
    backend->release_all();
    ++ran;
  }
  EXPECT_GE(ran, 7);
}

INSTANTIATE_TEST_SUITE_P(All, CopierCases, testing::ValuesIn(kOrders), [](const auto& tested) { return order_name(tested.param); });

}  // namespace
}  // namespace lmcn::copier_suite
