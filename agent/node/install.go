package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Installation is where the CNI plugin goes.
type Installation struct {
	BinDir      string // of the container runtime's CNI plugins
	ConfDir     string // of its CNI configurations
	Binary      string // mantlet-agent
	StateDir    string // of State files, as the node has it
	KubeletRoot string
}

// Install puts the plugin's binary in place, and then the plugin at the end of the node's CNI configuration: the first of the folder, which is that
// which container runtimes take. What is as it should be is not touched. It reports whether anything was changed.
func (i Installation) Install() (changed bool, err error) {
	placed, err := i.place()
	if err != nil {
		return false, err
	}
	listed, err := i.list()
	return placed || listed, err
}

func (i Installation) plugin() string { return filepath.Join(i.BinDir, PluginName) }

// place puts the binary in place.
func (i Installation) place() (changed bool, err error) {
	plugin := i.plugin()
	same, err := sameContent(i.Binary, plugin)
	if err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	if same {
		return false, nil
	}
	binary, err := os.Open(i.Binary)
	if err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	defer binary.Close()
	if err := replace(plugin, binary, 0o755); err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	return true, nil
}

// list puts the plugin into the CNI configuration.
func (i Installation) list() (changed bool, err error) {
	confs, err := i.confs()
	if err != nil {
		return false, err
	}
	if len(confs) == 0 {
		return false, fmt.Errorf("no CNI configuration in %s yet: install the cluster's network plugin; this one comes after it", i.ConfDir)
	}
	if filepath.Ext(confs[0]) != ".conflist" {
		return false, fmt.Errorf("the CNI configuration %s is not a list, to which a plugin could be added: write it as a .conflist", confs[0])
	}
	entry, err := json.Marshal(map[string]string{"type": PluginName, "kubeletRoot": i.KubeletRoot, "stateDir": i.StateDir})
	if err != nil {
		return false, err
	}
	return edit(confs[0], entry)
}

// Uninstall takes the plugin out of all CNI configurations, which are then what they were, byte for byte, and its binary and the State files away. Pods that are closed or enforced stay so. No
// daemon may run on the node: it would put the plugin back.
func (i Installation) Uninstall() error {
	confs, err := i.confs()
	for _, c := range confs {
		if filepath.Ext(c) == ".conflist" {
			_, eerr := edit(c, nil)
			err = errors.Join(err, eerr)
		}
	}
	if err != nil {
		return err // the binary stays as long as a configuration may name it
	}
	if err := os.Remove(i.plugin()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	entries, err := os.ReadDir(i.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(i.StateDir, e.Name())))
	}
	if err != nil {
		return err
	}
	if err := os.Remove(i.StateDir); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EROFS) { // in a container it is a mount
		return err
	}
	return nil
}

// Keep keeps the plugin installed until ctx ends: whoever writes the configuration anew leaves it out.
func (i Installation) Keep(ctx context.Context, logger *slog.Logger) {
	const every = 2 * time.Second
	last := ""
	var seen os.FileInfo // the binary, when it was as it should be
	for {
		now, err := os.Stat(i.plugin())
		there := err == nil && seen != nil && os.SameFile(now, seen) && now.Size() == seen.Size() && now.ModTime().Equal(seen.ModTime()) && now.Mode() == seen.Mode()
		var placed, listed bool
		if err = nil; !there { // it is large: compared once
			placed, err = i.place()
		}
		if err == nil {
			seen, _ = os.Stat(i.plugin())
			listed, err = i.list()
		}
		changed := placed || listed
		switch {
		case err != nil && err.Error() != last:
			logger.Error("node: pods start without being closed first, and their sidecars wait", "cause", err)
			last = err.Error()
		case err == nil && changed:
			logger.Info("node: CNI plugin installed", "binary", i.plugin(), "conf", i.ConfDir)
			last = ""
		}
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return
		}
	}
}

// confs are the CNI configurations, the first being the one that counts.
func (i Installation) confs() (list []string, err error) {
	entries, err := os.ReadDir(i.ConfDir) // by name
	if err != nil {
		return nil, fmt.Errorf("CNI configurations: %w", err)
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); slices.Contains([]string{".conf", ".conflist", ".json"}, ext) && !e.IsDir() {
			list = append(list, filepath.Join(i.ConfDir, e.Name()))
		}
	}
	return list, nil
}

// sameContent compares two files; one that is not there is another.
func sameContent(a, b string) (bool, error) {
	x, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer x.Close()
	y, err := os.Open(b)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer y.Close()
	xi, err := x.Stat()
	if err != nil {
		return false, err
	}
	yi, err := y.Stat()
	if err != nil || xi.Size() != yi.Size() || yi.Mode().Perm() != 0o755 {
		return false, err
	}
	p, q := make([]byte, 1<<16), make([]byte, 1<<16)
	for {
		n, perr := io.ReadFull(x, p)
		m, _ := io.ReadFull(y, q)
		switch {
		case !bytes.Equal(p[:n], q[:m]):
			return false, nil
		case perr != nil: // the end of both
			return true, nil
		}
	}
}
