package images

import (
	"archive/tar"
	"bytes"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// layer is a tar archive of files that are executable and root's, the directories that they are in, and /tmp.
func layer(files map[string]string) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	made := map[string]bool{}
	directory := func(name string, mode int64) error {
		if made[name] {
			return nil
		}
		made[name] = true
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
	}
	if err := directory("tmp", 0o1777); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		inside := strings.TrimPrefix(path.Clean(name), "/")
		for i, r := range inside {
			if r == '/' {
				if err := directory(inside[:i], 0o755); err != nil {
					return nil, err
				}
			}
		}
		content, err := os.ReadFile(files[name])
		if err != nil {
			return nil, err
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: inside, Mode: 0o755, Size: int64(len(content)), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}
