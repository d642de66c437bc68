package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/link"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Volume is the emptyDir volume in which the sidecar has its run directory.
const Volume = "mantlet-run"

// socketIn is the agent's socket in the volume: agent.NodeSocket of the run directory there.
const socketIn = "agent/node.sock"

// VolumePath is where the kubelet has the volume of a pod, if the pod has one. The kubelet makes volumes before it makes the pod's sandbox
// (kubelet: SyncPod), and so before any CNI plugin runs.
func VolumePath(kubeletRoot, uid string) string {
	return filepath.Join(podPath(kubeletRoot, uid), "volumes", "kubernetes.io~empty-dir", Volume)
}

func podPath(kubeletRoot, uid string) string { return filepath.Join(kubeletRoot, "pods", uid) }

// awaitEvery is how often an agent that is not there is looked for: the volume is mounted, and the folder in it made, at any time.
const awaitEvery = 25 * time.Millisecond

// Await connects to the agent whose run directory is in a volume, as soon as it is there, and tells as whom it runs.
func Await(ctx context.Context, volume string) (net.Conn, proxyuser.User, error) {
	tick := time.NewTicker(awaitEvery)
	defer tick.Stop()
	for {
		conn, cred, err := connect(volume)
		switch {
		case err == nil:
			return conn, proxyuser.User{UID: cred.Uid, GID: cred.Gid}, nil
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED): // not yet, or no more
		default:
			return nil, proxyuser.User{}, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, proxyuser.User{}, ctx.Err()
		}
	}
}

// connect connects to the agent's socket, and tells who listens. The volume's content is the pod's: no link in it is followed, and who listens must be
// of the users that only sidecars are: apps are not let be one of them (controlplane/inject), and cannot know which is this pod's.
func connect(volume string) (_ net.Conn, _ *unix.Ucred, err error) {
	dir, err := os.Open(volume)
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), socketIn, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("the agent's socket %s in %s: %w", socketIn, volume, err)
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, nil, err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, nil, fmt.Errorf("%s in %s is no socket", socketIn, volume)
	}
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d", fd)) //nolint:noctx // a unix socket answers at once or not at all
	if err != nil {
		return nil, nil, err
	}
	cred, err := link.Credentials(conn.(*net.UnixConn))
	if err == nil && !proxyuser.Pod.Has(proxyuser.User{UID: cred.Uid, GID: cred.Gid}) {
		err = fmt.Errorf("user %d, group %d listens on the agent's socket, and sidecars are of %s, both", cred.Uid, cred.Gid, proxyuser.Pod)
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, cred, nil
}
