package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// Program is one that a cluster is made of. "node" is the first process of a machine.
type Program struct {
	Machine, Name, Log string
	PID                int
	Alive              bool
}

// Status lists the programs of the cluster in a directory, whether they run or not, in a fixed order.
func Status(directory string) ([]Program, error) {
	s, err := readState(directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no cluster in %s\n  hint: cluster up", directory)
	}
	if err != nil {
		return nil, err
	}
	var out []Program
	for _, m := range append([]*Machine{s.Control}, s.Nodes...) {
		out = append(out, Program{Machine: m.Name, Name: "node", PID: m.Init.PID, Alive: m.Init.alive()})
		for _, name := range slices.Sorted(maps.Keys(m.Tasks)) {
			t := m.Tasks[name]
			out = append(out, Program{Machine: m.Name, Name: name, Log: t.Log, PID: t.PID, Alive: t.alive()})
		}
	}
	return out, nil
}

// Remove ends the cluster in a directory, whatever state it is in, and removes the directory. Where there is none, there is nothing to do. A
// directory with anything else in it is left alone.
func Remove(directory string) error {
	directory, err := filepath.Abs(directory)
	if err != nil {
		return err
	}
	s, err := readState(directory)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.Remove(filepath.Join(directory, "logs")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("no cluster in %s; the logs of one that did not start are left there: %w", directory, err)
		}
		if err := os.Remove(directory); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("no cluster in %s: %w", directory, err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	return (&Cluster{directory: directory, state: s}).Down()
}
