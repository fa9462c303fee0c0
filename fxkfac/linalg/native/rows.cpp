// Where numbers are, and where sums of their products go.
//
// The files of this folder are compiled as one, for one type of numbers: rows, vectors, panels,
// boxes, moved; and in single precision digits, products, sums.

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
constexpr int64_t CACHED = 1 << 19;   // bytes of a sum that may stay in the second cache
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

// A part of the sum, where some columns meet others.
template <class T>
struct Corner {
  T* start;
  int64_t step;
  int rows, columns;
};

// Where the sum goes, multiplied by what, and whether it is added to what is there, all symmetric.
template <class T>
struct Total {
  T* start;
  int64_t step, d;
  T scale;
  bool adds;

  // Whether it is large, new, and of whole lines: those go to memory without being read.
  bool passes_cache(bool adds) const {
    const int64_t bytes = step * sizeof(T);
    const bool lines = bytes % LINE == 0 && reinterpret_cast<intptr_t>(start) % LINE == 0;
    return lines && !adds && bytes * d > CACHED;
  }

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
