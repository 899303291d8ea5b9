#include <aclapi.h>
#include <sddl.h>

#include <algorithm>
#include <array>
#include <memory>

#include "cuda/cache_folder.hpp"
#include "platform/windows_text.hpp"

namespace flashspark::cuda {
namespace {

struct Closes {
  void operator()(HANDLE handle) const { CloseHandle(handle); }
};
using Handle = std::unique_ptr<void, Closes>;
struct FreesLocal {
  void operator()(void *memory) const { LocalFree(memory); }
};

Handle open_file(const std::string &path, DWORD access, DWORD share, DWORD how, DWORD flags) {
  const HANDLE handle = CreateFileW(wide(path).c_str(), access, share, nullptr, how, flags, nullptr);
  return Handle(handle == INVALID_HANDLE_VALUE ? nullptr : handle);
}

// The user of this process, as a TOKEN_USER; empty if the system does not say.
std::vector<char> this_user() {
  HANDLE token = nullptr;
  if (!OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, &token)) return {};
  const Handle owner(token);
  DWORD size = 0;
  GetTokenInformation(token, TokenUser, nullptr, 0, &size);
  std::vector<char> user(size);
  if (!GetTokenInformation(token, TokenUser, user.data(), size, &size)) return {};
  return user;
}

// This user, and those who can write to whatever they like: the system and administrators, who own what an elevated
// process of this user makes.
bool is_trusted(PSID who, PSID user) {
  return EqualSid(who, user) || IsWellKnownSid(who, WinLocalSystemSid) ||
         IsWellKnownSid(who, WinBuiltinAdministratorsSid);
}

// Whether nobody but those may write to what has this list.
bool only_trusted_write(PACL list, PSID user) {
  constexpr ACCESS_MASK kWrites = FILE_ADD_FILE | FILE_ADD_SUBDIRECTORY | FILE_DELETE_CHILD | DELETE | WRITE_DAC |
                                  WRITE_OWNER | GENERIC_WRITE | GENERIC_ALL;
  if (list == nullptr) return false;  // everybody may do everything
  for (DWORD n = 0; n < list->AceCount; ++n) {
    void *entry = nullptr;
    if (!GetAce(list, n, &entry)) return false;
    const auto *header = static_cast<const ACE_HEADER *>(entry);
    if ((header->AceFlags & INHERIT_ONLY_ACE) != 0 || header->AceType == ACCESS_DENIED_ACE_TYPE) continue;
    if (header->AceType != ACCESS_ALLOWED_ACE_TYPE) return false;  // of a kind that nobody gives to folders
    auto *allowed = static_cast<ACCESS_ALLOWED_ACE *>(entry);
    if ((allowed->Mask & kWrites) != 0 && !is_trusted(&allowed->SidStart, user)) return false;
  }
  return true;
}

// Why a folder is not used, or "".
std::string fault_of(HANDLE folder) {
  if (folder == nullptr) return error_words(GetLastError());
  PSID owner = nullptr;
  PACL list = nullptr;
  PSECURITY_DESCRIPTOR descriptor = nullptr;
  const DWORD error = GetSecurityInfo(folder, SE_FILE_OBJECT, OWNER_SECURITY_INFORMATION | DACL_SECURITY_INFORMATION,
                                      &owner, nullptr, &list, nullptr, &descriptor);
  if (error != ERROR_SUCCESS) return error_words(error);
  const std::unique_ptr<void, FreesLocal> memory(descriptor);
  const std::vector<char> user = this_user();
  if (user.empty()) return "not used, since Windows does not say who this user is";
  PSID sid = reinterpret_cast<const TOKEN_USER *>(user.data())->User.Sid;
  if (owner == nullptr || !is_trusted(owner, sid)) return "not used, since another user owns it";
  if (!only_trusted_write(list, sid)) return "not used, since others may write to it";
  return "";
}

// The rights of a new folder: this user's, the system's and administrators', and none from the folder above it.
std::unique_ptr<void, FreesLocal> owner_only() {
  const std::vector<char> user = this_user();
  LPWSTR name = nullptr;
  if (user.empty() || !ConvertSidToStringSidW(reinterpret_cast<const TOKEN_USER *>(user.data())->User.Sid, &name))
    return nullptr;
  const std::unique_ptr<void, FreesLocal> memory(name);
  const std::wstring rights = std::wstring(L"D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;FA;;;") + name + L")";
  PSECURITY_DESCRIPTOR descriptor = nullptr;
  ConvertStringSecurityDescriptorToSecurityDescriptorW(rights.c_str(), SDDL_REVISION_1, &descriptor, nullptr);
  return std::unique_ptr<void, FreesLocal>(descriptor);
}

bool write_all(HANDLE file, std::string_view text) {
  while (!text.empty()) {
    DWORD count = 0;
    const auto wanted = static_cast<DWORD>(std::min<size_t>(text.size(), 1 << 30));
    if (!WriteFile(file, text.data(), wanted, &count, nullptr) || count == 0) return false;
    text.remove_prefix(count);
  }
  return true;
}

int64_t join(DWORD high, DWORD low) {
  return static_cast<int64_t>(uint64_t{high} << 32 | low);
}

// FILETIME counts 100 ns since 1601.
int64_t nanoseconds(const FILETIME &time) {
  constexpr int64_t kBefore1970 = 116'444'736'000'000'000;
  return (join(time.dwHighDateTime, time.dwLowDateTime) - kBefore1970) * 100;
}

}  // namespace

void CacheFolder::make(const std::string &path) {
  const std::unique_ptr<void, FreesLocal> rights = owner_only();
  SECURITY_ATTRIBUTES attributes{sizeof attributes, rights.get(), FALSE};
  const auto make_one = [&](size_t end) {
    CreateDirectoryW(wide(path.substr(0, end)).c_str(), rights != nullptr ? &attributes : nullptr);
  };
  for (size_t end = path.find_first_of("/\\", 3); end != std::string::npos; end = path.find_first_of("/\\", end + 1))
    make_one(end);
  make_one(path.size());
}

// Without FILE_SHARE_DELETE nobody renames or removes it.
CacheFolder::CacheFolder(const std::string &path)
    : folder_(open_file(path, READ_CONTROL | FILE_LIST_DIRECTORY, FILE_SHARE_READ | FILE_SHARE_WRITE, OPEN_EXISTING,
                        FILE_FLAG_BACKUP_SEMANTICS)
                  .release()),
      path_(path + "\\"),
      fault_(fault_of(folder_)) {
  if (!fault_.empty()) fault_ = path + ": " + fault_;
}

CacheFolder::~CacheFolder() {
  if (folder_ != nullptr) CloseHandle(folder_);
}

std::vector<CacheFolder::File> CacheFolder::list() const {
  std::vector<File> files;
  WIN32_FIND_DATAW found;
  const HANDLE search = FindFirstFileW(wide(path_ + "*").c_str(), &found);
  if (search == INVALID_HANDLE_VALUE) return files;
  do {
    if ((found.dwFileAttributes & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_REPARSE_POINT)) != 0) continue;
    files.push_back(
        {narrow(found.cFileName), join(found.nFileSizeHigh, found.nFileSizeLow), nanoseconds(found.ftLastWriteTime)});
  } while (FindNextFileW(search, &found));
  FindClose(search);
  return files;
}

std::optional<std::vector<char>> CacheFolder::read(const std::string &name, int64_t max_bytes) const {
  // Another process may replace or remove it meanwhile.
  const Handle file = open_file(path_ + name, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                                OPEN_EXISTING, FILE_FLAG_OPEN_REPARSE_POINT);
  BY_HANDLE_FILE_INFORMATION facts{};
  if (!file || !GetFileInformationByHandle(file.get(), &facts)) return std::nullopt;
  if ((facts.dwFileAttributes & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_REPARSE_POINT)) != 0) return std::nullopt;
  const int64_t size = join(facts.nFileSizeHigh, facts.nFileSizeLow);
  if (size > max_bytes) return std::nullopt;
  std::vector<char> bytes(static_cast<size_t>(size));
  for (size_t done = 0; done < bytes.size();) {
    DWORD count = 0;
    const auto wanted = static_cast<DWORD>(std::min<size_t>(bytes.size() - done, 1 << 30));
    if (!ReadFile(file.get(), bytes.data() + done, wanted, &count, nullptr) || count == 0) return std::nullopt;
    done += count;
  }
  return bytes;
}

bool CacheFolder::write(const std::string &name, std::string_view begin, std::string_view rest) const {
  const Handle file = open_file(path_ + name, GENERIC_WRITE, 0, CREATE_NEW, FILE_ATTRIBUTE_NORMAL);
  return file != nullptr && write_all(file.get(), begin) && write_all(file.get(), rest);
}

bool CacheFolder::rename(const std::string &from, const std::string &to) const {
  return MoveFileExW(wide(path_ + from).c_str(), wide(path_ + to).c_str(), MOVEFILE_REPLACE_EXISTING);
}

void CacheFolder::remove(const std::string &name) const {
  DeleteFileW(wide(path_ + name).c_str());
}

void CacheFolder::mark_used(const std::string &name) const {
  const Handle file =
      open_file(path_ + name, FILE_WRITE_ATTRIBUTES, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                OPEN_EXISTING, FILE_FLAG_OPEN_REPARSE_POINT);
  FILETIME now;
  GetSystemTimeAsFileTime(&now);
  if (file) SetFileTime(file.get(), nullptr, nullptr, &now);
}

}  // namespace flashspark::cuda
