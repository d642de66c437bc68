package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// State is what the CNI plugin leaves for the daemon of each pod that it has closed: a file in the state folder, named after the sandbox's
// container ID. It goes with the pod.
type State struct {
	ContainerID string `json:"containerID"` // of the pod's sandbox
	Netns       string `json:"netns"`       // path of the pod's network namespace
	Namespace   string `json:"namespace"`
	Name        string `json:"name"`
	UID         string `json:"uid"`
}

// word is what IDs are made of; none leads out of a folder.
var word = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_.-]{0,252}$`)

func (s State) check() error {
	for _, f := range []struct{ name, value string }{{"container ID", s.ContainerID}, {"pod namespace", s.Namespace}, {"pod name", s.Name}, {"pod UID", s.UID}} {
		if !word.MatchString(f.value) {
			return fmt.Errorf("%s %q is none", f.name, f.value)
		}
	}
	if !filepath.IsAbs(s.Netns) {
		return fmt.Errorf("network namespace %q is no absolute path", s.Netns)
	}
	return nil
}

const suffix = ".json"

func statePath(dir, id string) string { return filepath.Join(dir, id+suffix) }

// write puts the state in place, all of it at once.
func (s State) write(dir string) error {
	if err := s.check(); err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	return replace(statePath(dir, s.ContainerID), bytes.NewReader(b), 0o600)
}

func readState(path string) (s State, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("state %s: %w", path, err)
	}
	if err := s.check(); err != nil {
		return s, fmt.Errorf("state %s: %w", path, err)
	}
	if statePath(filepath.Dir(path), s.ContainerID) != path {
		return s, fmt.Errorf("state %s: it is that of container %s", path, s.ContainerID)
	}
	return s, nil
}

// readStates reads all that can be read. The error is of those that cannot.
func readStates(dir string) (list []State, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), suffix) {
			continue // being written
		}
		s, rerr := readState(filepath.Join(dir, e.Name()))
		switch {
		case errors.Is(rerr, fs.ErrNotExist):
		case rerr != nil:
			err = errors.Join(err, rerr)
		default:
			list = append(list, s)
		}
	}
	return list, err
}

func removeState(dir, id string) error {
	if !word.MatchString(id) {
		return fmt.Errorf("container ID %q is none", id)
	}
	if err := os.Remove(statePath(dir, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// replace puts a file in place, all of it at once.
func replace(path string, content io.Reader, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".mantlet-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, werr := io.Copy(f, content)
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
