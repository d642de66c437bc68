package console

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// request is the first message of a caller, after one byte that carries its three files.
type request struct {
	Pod      string   `json:"pod"`
	Args     []string `json:"args"`
	Env      []string `json:"env"`
	Dir      string   `json:"dir,omitempty"`
	Terminal bool     `json:"terminal,omitempty"`
}

// order is what a caller says later on.
type order struct {
	Signal syscall.Signal `json:"signal"`
}

// reply is the only message that a caller gets.
type reply struct {
	Error string `json:"error,omitempty"` // it never ran
	Exit  int    `json:"exit"`
}

// maxRequest bounds what is read of a caller at a time, in bytes.
const maxRequest = 1 << 20

func prefix() string { return fmt.Sprintf("@mantlet/sandbox/%d/", os.Getuid()) }

// Listen makes the socket of a sandbox, for the process that calls netns.Reenter, and returns it as a file to pass on. The sandbox is
// known by the process's number.
func Listen() (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: prefix() + strconv.Itoa(os.Getpid()), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make the sandbox's console: %w", err)
	}
	defer func() { _ = l.Close() }() // the file is a copy
	return l.File()
}

// Running lists the process numbers of this user's sandboxes that take commands, in order. Whether they are really this user's, Run finds out.
func Running() ([]int, error) {
	text, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, fmt.Errorf("look for sandboxes: %w", err)
	}
	var list []int
	for line := range bytes.Lines(text) {
		fields := strings.Fields(string(line)) // …, flags, type, state, inode, path: proc_net_unix in proc(5)
		if len(fields) != 8 || fields[3] != "00010000" {
			continue
		}
		number, ok := strings.CutPrefix(fields[7], prefix())
		if pid, err := strconv.Atoi(number); ok && err == nil {
			list = append(list, pid)
		}
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// peerUID is the user at the other end, as this process's user namespace calls it.
func peerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// sendFiles passes standard input, output and error.
func sendFiles(conn *net.UnixConn, files [3]*os.File) error {
	rights := unix.UnixRights(int(files[0].Fd()), int(files[1].Fd()), int(files[2].Fd()))
	_, _, err := conn.WriteMsgUnix([]byte{0}, rights, nil)
	return err
}

var errNoFiles = errors.New("the caller did not pass its standard input, output and error")

func receiveFiles(conn *net.UnixConn) (files [3]*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(3*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return files, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return files, err
	}
	var fds []int
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		fds = append(fds, got...)
	}
	if n != 1 || len(fds) != 3 || flags&unix.MSG_CTRUNC != 0 {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return files, errNoFiles
	}
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		unix.CloseOnExec(fds[i])
		files[i] = os.NewFile(uintptr(fds[i]), name)
	}
	return files, nil
}
