package org.fleetune.demo;

import android.app.Activity;
import android.content.ActivityNotFoundException;
import android.content.Intent;
import android.net.Uri;
import android.os.Bundle;
import android.util.AndroidRuntimeException;
import android.webkit.ValueCallback;
import android.webkit.WebChromeClient;
import android.webkit.WebView;
import android.widget.TextView;
import android.widget.Toast;

/** The page on the screen, and the picker of a data file for it. */
public final class MainActivity extends Activity {
    private static final int PICK = 1;

    private WebView view;
    private ValueCallback<Uri[]> picked;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        TrainingService.stop(this); // its page too: one page at a time has the device's identity
        try {
            view = Page.open(this, "");
        } catch (AndroidRuntimeException missing) {
            TextView told = new TextView(this);
            told.setText(R.string.no_webview);
            setContentView(told);
            return;
        }
        view.setWebChromeClient(new Picker());
        setContentView(view);
    }

    @Override
    protected void onActivityResult(int request, int result, Intent data) {
        if (request == PICK && picked != null) {
            picked.onReceiveValue(WebChromeClient.FileChooserParams.parseResult(result, data));
            picked = null;
        }
    }

    @Override
    public void onBackPressed() {
        moveTaskToBack(true); // training goes on
    }

    @Override
    protected void onDestroy() {
        if (view != null) {
            view.destroy();
        }
        TrainingService.stop(this);
        super.onDestroy();
    }

    private final class Picker extends WebChromeClient {
        @Override
        public boolean onShowFileChooser(WebView asking, ValueCallback<Uri[]> answer, FileChooserParams how) {
            if (picked != null) {
                picked.onReceiveValue(null);
            }
            picked = answer;
            Intent asked = new Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*");
            try {
                startActivityForResult(asked, PICK);
            } catch (ActivityNotFoundException absent) {
                picked = null;
                Toast.makeText(MainActivity.this, R.string.no_file_picker, Toast.LENGTH_LONG).show();
                return false;
            }
            return true;
        }
    }
}
