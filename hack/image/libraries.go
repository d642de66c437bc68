package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// folders are where the dynamic linker looks, in its order (ld.so(8)), for the two architectures that Envoy is built for.
var folders = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// libraries lists what a binary is linked with at run time, and what that is, with the path at which each is expected: the linker that the
// binary names, and shared libraries. A static binary has none.
func libraries(binary string) (map[string]string, error) {
	found := map[string]string{} // path in the image → file here
	seen := map[string]bool{}
	var visit func(file string) error
	visit = func(file string) error {
		f, err := elf.Open(file)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		defer func() { _ = f.Close() }() // was only read
		for _, p := range f.Progs {
			if p.Type != elf.PT_INTERP {
				continue
			}
			text := make([]byte, p.Filesz)
			if _, err := p.ReadAt(text, 0); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			linker := string(text[:max(0, len(text)-1)]) // ends in NUL
			found[linker] = linker
		}
		needed, err := f.ImportedLibraries()
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, name := range needed {
			if seen[name] {
				continue
			}
			seen[name] = true
			path, err := find(name, f.Machine)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			found[path] = path
			if err := visit(path); err != nil {
				return err
			}
		}
		return nil
	}
	if err := visit(binary); err != nil {
		return nil, err
	}
	return found, nil
}

// find looks for a library of an architecture.
func find(name string, machine elf.Machine) (string, error) {
	i := slices.IndexFunc(folders, func(dir string) bool {
		f, err := elf.Open(filepath.Join(dir, name))
		if err != nil {
			return false
		}
		defer func() { _ = f.Close() }() // was only read
		return f.Machine == machine
	})
	if i < 0 {
		return "", fmt.Errorf("library %s is not on this machine", name)
	}
	return filepath.Join(folders[i], name), nil
}

// readFile reads a regular file, through symbolic links.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New(path + " is not a regular file")
	}
	return os.ReadFile(path)
}
