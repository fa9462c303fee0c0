// Where numbers are, and where sums of their products go.
//
// The files of this folder are compiled as one, in the order rows, vectors, digits, products, sums.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int LINE = 64;              // bytes of memory that come together
constexpr int64_t PAGE = 4096;        // bytes that are mapped together, at least
constexpr int64_t MAPPED = 32 << 20;  // bytes: memory of this size is mapped anew each time

// A matrix in memory: the entry in row k and column j is x[rows[k] + columns[j]].
template <class T>
struct Rows {
  const T* x;
  const int64_t *rows, *columns;
  int64_t number, d;
};

// Whether so many entries follow one another.
bool adjacent(const int64_t* offsets, int64_t number) {
  const auto apart = [](int64_t a, int64_t b) { return b != a + 1; };
  return std::adjacent_find(offsets, offsets + number, apart) == offsets + number;
}

// How many of the first entries follow the one before.
int64_t runs(const int64_t* offsets, int64_t number) {
  int64_t found = 0;
  for (int64_t k = 1; k < std::min<int64_t>(number, 64); ++k)
    found += offsets[k] == offsets[k - 1] + 1;
  return found;
}

// A part of the sum, where some columns meet others.
template <class T>
struct Corner {
  T* start;
  int64_t step;
  int rows, columns;

  // Ask for the memory of some rows, which will be written.
  void fetch(int from, int to) const {
    for (int i = from; i < std::min(to, rows); ++i)
      for (int j = 0; j < columns; j += LINE / sizeof(T))
        __builtin_prefetch(start + i * step + j, 0, 2);
  }
};

// Where the sum goes, multiplied by what, and whether it is added to what is there, all symmetric.
template <class T>
struct Total {
  T* start;
  int64_t step, d;
  T scale;
  bool adds;

  // So many rows and columns, or those that there are.
  Corner<T> corner(int64_t row, int64_t column, int64_t size) const {
    const auto width = [&](int64_t n) { return (int)std::clamp<int64_t>(d - n, 0, size); };
    return {start + row * step + column, step, width(row), width(column)};
  }
};

// Have memory mapped at once: page by page, when it is first written, takes half as long again.
void populate(char* start, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const int64_t before = -reinterpret_cast<intptr_t>(start) & (PAGE - 1);
  if (bytes > before) madvise(start + before, (bytes - before) & -PAGE, MADV_POPULATE_WRITE);
#endif
}

// The same for a large sum that nothing was added to yet, by threads that are there already.
template <class T>
void populate(const Total<T>& total, int threads) {
  const int64_t share = sizeof(T) * total.step * total.d / threads;
  const bool is_new = !total.adds && share * threads > MAPPED;
#pragma omp for schedule(static)
  for (int t = 0; t < (is_new ? threads : 0); ++t)
    populate(reinterpret_cast<char*>(total.start) + t * share, share);
}

}  // namespace
