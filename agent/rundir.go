package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// runDir is the run directory while this agent has it to itself.
type runDir struct {
	path string
	lock *os.File
	gid  int // who may enter besides the agent's user; -1: nobody
}

// openRunDir makes the directory, closes it to everybody but the agent's user and the proxy's group, and locks it.
func openRunDir(path string, as envoy.Privilege, user proxyuser.User) (*runDir, error) {
	d := &runDir{path: path, gid: -1}
	mode := os.FileMode(0o700)
	if as == envoy.OwnUser {
		d.gid, mode = int(user.GID), 0o710
	}
	if err := os.MkdirAll(path, mode); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if err := os.Chown(path, -1, d.gid); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, "agent.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("run directory %s: another agent runs there; stop it or choose another directory", path)
		}
		return nil, fmt.Errorf("run directory: lock %s: %w", lock.Name(), err)
	}
	d.lock = lock
	return d, nil
}

// listen makes a unix socket in the directory. A file that an earlier agent left there is replaced.
func (d *runDir) listen(path string, mode os.FileMode, gid int) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := net.Listen("unix", path) //nolint:noctx // a unix socket needs no lookup
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, mode)); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func (d *runDir) close() error { return d.lock.Close() }
