#include "report.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <tuple>

namespace gradclip::cuda::sweep {
namespace {

constexpr const char* kHeader =
    "family,list,bytes,tensors,work,variant,threads,blocks,loads,status,repeats,median_us,"
    "fastest_us,stream_us,host_us,gb_per_s,percent_of_read,note";
constexpr size_t kColumns = 18;
constexpr size_t kFastest = 3;

[[noreturn]] void fail(const std::string& path, const char* what) {
  std::fprintf(stderr, "%s: %s\n", path.c_str(), what);
  std::exit(1);
}

// In quotes, since names hold commas; quotes and line breaks would need more than that.
std::string quoted(std::string text) {
  for (char& character : text) {
    if (character == '"') character = '\'';
    if (character == '\n' || character == '\r') character = ' ';
  }
  return '"' + text + '"';
}

std::string number(double value) {
  if (!(value >= 0.0)) return "";
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  if (value >= 1000.0) std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

std::vector<std::string> fields_of(const std::string& line) {
  std::vector<std::string> fields(1);
  bool in_quotes = false;
  for (const char character : line) {
    if (character == '"') {
      in_quotes = !in_quotes;
    } else if (character == ',' && !in_quotes) {
      fields.emplace_back();
    } else {
      fields.back() += character;
    }
  }
  return fields;
}

double number_of(const std::string& field) {
  return field.empty() ? -1.0 : std::strtod(field.c_str(), nullptr);
}

// A variant with the knobs that its name does not tell.
std::string label(const Row& row) {
  std::string text = row.variant;
  if (row.blocks > 0) text += " " + std::to_string(row.blocks) + "x" + std::to_string(row.threads);
  if (row.loads > 0 && row.loads != 4) text += " loads " + std::to_string(row.loads);
  return text;
}

bool is_of_today(const Row& row) { return row.variant == "today"; }

std::string line_of(const std::vector<const Row*>& group) {
  std::vector<const Row*> timed;
  const Row* today = nullptr;
  for (const Row* row : group) {
    if (row->status != "ok" || row->median < 0.0) continue;
    if (today == nullptr && is_of_today(*row)) {
      today = row;
    } else {
      timed.push_back(row);
    }
  }
  std::stable_sort(timed.begin(), timed.end(),
                   [](const Row* a, const Row* b) { return a->median < b->median; });
  const Row& first = *group.front();
  std::string line = first.family + " " + first.work + ", " + first.list + ":";
  if (today != nullptr) {
    line += " today " + number(today->median) + " us";
    if (today->percent_of_read >= 0.0) {
      line += " (" + number(today->percent_of_read) + "% of read)";
    }
  }
  for (size_t i = 0; i < std::min(kFastest, timed.size()); ++i) {
    line += "; " + label(*timed[i]) + " " + number(timed[i]->median);
    if (today != nullptr) {
      char ratio[32];
      std::snprintf(ratio, sizeof ratio, " (x%.3f)", timed[i]->median / today->median);
      line += ratio;
    } else if (timed[i]->gigabytes_per_second >= 0.0) {
      line += " us, " + number(timed[i]->gigabytes_per_second) + " GB/s";
    }
  }
  return line;
}

}  // namespace

double median(std::vector<double> numbers) {
  if (numbers.empty()) return -1.0;
  std::sort(numbers.begin(), numbers.end());
  const size_t middle = numbers.size() / 2;
  return numbers.size() % 2 == 1 ? numbers[middle] : (numbers[middle - 1] + numbers[middle]) / 2;
}

Csv::Csv(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "a")) {
  if (file_ == nullptr) fail(path, "cannot be written");
  std::fseek(file_, 0, SEEK_END);
  if (std::ftell(file_) == 0) std::fprintf(file_, "%s\n", kHeader);
}

Csv::~Csv() { std::fclose(file_); }

void Csv::write(const Row& row) {
  std::fprintf(file_, "%s,%s,%lld,%lld,%s,%s,%d,%d,%d,%s,%d,%s,%s,%s,%s,%s,%s,%s\n",
               quoted(row.family).c_str(), quoted(row.list).c_str(),
               static_cast<long long>(row.bytes), static_cast<long long>(row.tensors),
               quoted(row.work).c_str(), quoted(row.variant).c_str(), row.threads, row.blocks,
               row.loads, row.status.c_str(), row.repeats, number(row.median).c_str(),
               number(row.fastest).c_str(), number(row.stream).c_str(), number(row.host).c_str(),
               number(row.gigabytes_per_second).c_str(), number(row.percent_of_read).c_str(),
               quoted(row.note).c_str());
  if (std::fflush(file_) != 0) fail(path_, "cannot be written");
}

Rows read_rows(const std::string& path) {
  Rows found;
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line) || line != kHeader) {
    found.problem = path + " does not begin with the header of a sweep";
    return found;
  }
  while (std::getline(file, line)) {
    const std::vector<std::string> fields = fields_of(line);
    if (fields.size() != kColumns) {
      // The last line of a program that was killed.
      found.problem = path + " holds a line of " + std::to_string(fields.size()) + " columns";
      continue;
    }
    Row row;
    row.family = fields[0];
    row.list = fields[1];
    row.bytes = std::atoll(fields[2].c_str());
    row.tensors = std::atoll(fields[3].c_str());
    row.work = fields[4];
    row.variant = fields[5];
    row.threads = std::atoi(fields[6].c_str());
    row.blocks = std::atoi(fields[7].c_str());
    row.loads = std::atoi(fields[8].c_str());
    row.status = fields[9];
    row.repeats = std::atoi(fields[10].c_str());
    row.median = number_of(fields[11]);
    row.fastest = number_of(fields[12]);
    row.stream = number_of(fields[13]);
    row.host = number_of(fields[14]);
    row.gigabytes_per_second = number_of(fields[15]);
    row.percent_of_read = number_of(fields[16]);
    row.note = fields[17];
    found.rows.push_back(row);
  }
  return found;
}

std::string table(const std::vector<Row>& rows, size_t most) {
  // In the order in which they were measured.
  std::vector<std::vector<const Row*>> groups;
  std::map<std::tuple<std::string, std::string, std::string>, size_t> places;
  std::string bad;
  for (const Row& row : rows) {
    const auto [place, is_new] =
        places.try_emplace({row.family, row.list, row.work}, groups.size());
    if (is_new) groups.emplace_back();
    groups[place->second].push_back(&row);
    if (row.status == "ok" || row.status == "unsupported") continue;
    bad += row.status + ": " + row.family + " " + row.work + ", " + row.list + ": " + label(row) +
           ": " + row.note + "\n";
  }
  // Should there be too much, the end of the longest family is missing.
  std::map<std::string, int> lengths;
  for (const auto& group : groups) ++lengths[group.front()->family];
  std::stable_sort(groups.begin(), groups.end(), [&](const auto& a, const auto& b) {
    return lengths[a.front()->family] < lengths[b.front()->family];
  });
  constexpr size_t kMostOfBad = 1500;
  if (bad.size() > kMostOfBad) bad = bad.substr(0, kMostOfBad) + "...\n";
  std::string text = bad;
  const std::string rest = "... and more, in the CSV\n";
  for (const auto& group : groups) {
    // Quiet calls differ from measuring alone by one launch; the CSV has them.
    if (group.front()->work == "quiet") continue;
    const std::string line = line_of(group) + "\n";
    if (text.size() + line.size() + rest.size() > most) return text + rest;
    text += line;
  }
  return text;
}

}  // namespace gradclip::cuda::sweep
