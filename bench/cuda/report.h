// What the sweep writes: a CSV of all that it has tried, and a table of the fastest. Plain C++.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace gradclip::cuda::sweep {

// A line of the CSV; sweep.cpp says what the columns mean.
struct Row {
  std::string family;
  std::string list;
  int64_t bytes = 0;
  int64_t tensors = 0;
  // measure, quiet, clip, or what else is timed.
  std::string work;
  std::string variant;
  int threads = 0;
  int blocks = 0;
  int loads = 0;
  // ok, wrong, unsupported, failed.
  std::string status = "ok";
  int repeats = 0;
  // Microseconds; negative where there is none.
  double median = -1.0;
  double fastest = -1.0;
  double stream = -1.0;
  double host = -1.0;
  // Negative where there is none.
  double gigabytes_per_second = -1.0;
  double percent_of_read = -1.0;
  std::string note;
};

double median(std::vector<double> numbers);

class Csv {
 public:
  // Appends; a new file gets a header first. Ends the program with a message if that fails.
  explicit Csv(const std::string& path);
  ~Csv();
  Csv(const Csv&) = delete;
  Csv& operator=(const Csv&) = delete;

  // Is in the file when this returns.
  void write(const Row& row);

 private:
  std::string path_;
  std::FILE* file_;
};

// The rows of a file that Csv has written, and what it could not read as one.
struct Rows {
  std::vector<Row> rows;
  std::string problem;
};
Rows read_rows(const std::string& path);

// For each family, list and work the three fastest beside today's, then what is wrong; in at most
// `most` characters.
std::string table(const std::vector<Row>& rows, size_t most);

}  // namespace gradclip::cuda::sweep
