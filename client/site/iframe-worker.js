// The search runs in a worker, and a page that was opened from a disk may not start one: there, the same script runs in a
// frame of the page. Material looks for the name IFrameWorker.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super()
    this.onmessage = this.onerror = null
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    this.inside = frame.contentWindow
    this.inside.postMessage = data => {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      this.onmessage?.(event)
    }
    this.waiting = new Promise(resolve => {
      const script = frame.contentDocument.createElement("script")
      script.src = url
      script.onload = resolve
      frame.contentDocument.head.append(script)
    })
  }

  postMessage(data) {
    this.waiting.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
  }
}

if (location.protocol === "file:") window.Worker = window.IFrameWorker = IFrameWorker
