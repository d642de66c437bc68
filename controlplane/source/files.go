package source

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// Limits on the input. They are far above what a cluster of some thousand pods exports, and keep a hostile repository from
// exhausting the machine.
const (
	maxFileBytes = 64 << 20
	maxAllBytes  = 256 << 20
	maxEntries   = 100_000 // files and folders looked at
)

// file is one text of the input.
type file struct {
	name  string
	data  []byte
	named bool // named by the user himself, and not found in a folder
}

// finder collects the files below the given paths.
type finder struct {
	stdin    io.Reader
	files    []*file
	problems Problems
	seen     map[string]bool // real paths of files and folders: ends symlink loops, and reads each file once
	entries  int
	bytes    int64
}

func (f *finder) problem(name, hint, format string, args ...any) {
	f.problems = append(f.problems, Problem{File: name, Text: fmt.Sprintf(format, args...), Hint: hint})
}

// add reads a path that the user named: a file of any name, a folder, or "-" for stdin.
func (f *finder) add(path string) {
	if path == "-" {
		f.read("stdin", f.stdin, true)
		return
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		f.problem(path, "name a file or folder that exists", "%v", pathError(err))
	case info.IsDir():
		before := len(f.files) + len(f.problems)
		repeated := f.repeated(path)
		if !repeated {
			f.walk(path)
		}
		if !repeated && len(f.files)+len(f.problems) == before {
			f.problem(path, "name a folder that holds .yaml, .yml or .json files; hidden folders are not searched", "no manifests in this folder")
		}
	default: // also a pipe, such as the shell makes for <(kustomize build)
		if !f.repeated(path) {
			f.open(path, true)
		}
	}
}

// repeated notes a file or folder by its real path, and reports whether it had been noted before.
func (f *finder) repeated(path string) bool {
	real, err := filepath.EvalSymlinks(path)
	if err != nil { // a pipe has none
		return false
	}
	if real, err = filepath.Abs(real); err != nil {
		return false
	}
	if f.seen[real] {
		return true
	}
	f.seen[real] = true
	return false
}

func (f *finder) walk(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		f.problem(dir, "make it readable", "%v", pathError(err))
		return
	}
	for _, e := range entries {
		if f.entries++; f.entries > maxEntries {
			if f.entries == maxEntries+1 {
				f.problem(dir, "name the folder that holds the manifests", "more than %d files and folders", maxEntries)
			}
			return
		}
		path := filepath.Join(dir, e.Name())
		manifest := slices.Contains([]string{".yaml", ".yml", ".json"}, strings.ToLower(filepath.Ext(path)))
		mode := e.Type()
		if mode&fs.ModeSymlink != 0 {
			info, err := os.Stat(path)
			if err != nil {
				if manifest {
					f.problem(path, "mend or remove the link", "broken symbolic link: %v", pathError(err))
				}
				continue
			}
			mode = info.Mode().Type()
		}
		switch {
		case mode.IsDir():
			if !strings.HasPrefix(e.Name(), ".") && !f.repeated(path) {
				f.walk(path)
			}
		case !manifest:
		case !mode.IsRegular():
			f.problem(path, "remove it, or name it itself", "not a regular file")
		case !f.repeated(path):
			f.open(path, false)
		}
	}
}

func (f *finder) open(path string, named bool) {
	r, err := os.Open(path)
	if err != nil {
		f.problem(path, "make it readable", "%v", pathError(err))
		return
	}
	defer func() { _ = r.Close() }() // was only read
	f.read(path, r, named)
}

func (f *finder) read(name string, r io.Reader, named bool) {
	if f.bytes > maxAllBytes {
		return // reported by the file that crossed the limit
	}
	data, err := io.ReadAll(io.LimitReader(r, maxFileBytes+1))
	f.bytes += int64(len(data))
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	switch {
	case err != nil:
		f.problem(name, "make it readable", "%v", pathError(err))
	case len(data) > maxFileBytes:
		f.problem(name, "split the file, or export fewer kinds", "larger than %d MiB", maxFileBytes>>20)
	case f.bytes > maxAllBytes:
		f.problem(name, "read fewer files", "the input is larger than %d MiB in all", maxAllBytes>>20)
	case !utf8.Valid(data):
		f.problem(name, "save it as UTF-8", "not UTF-8 text")
	default:
		f.files = append(f.files, &file{name: name, data: data, named: named})
	}
}

// pathError is the cause without the operation and path, which the problem names already.
func pathError(err error) error {
	if pe, ok := err.(*fs.PathError); ok { //nolint:errorlint // only the outermost
		return pe.Err
	}
	return err
}
